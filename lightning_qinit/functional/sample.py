"""The data that a step is chosen for: a tensor, or what calibration kept of many batches."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_qinit.functional.determinism import any_order
from lightning_qinit.functional.optimal import to_rows
from lightning_qinit.functional.rows import Rows, alike, squared_error, weighted


def float64_device(tensor: Tensor) -> torch.device:
    """Where to compute in float64: the tensor's own device, or the CPU if it has no float64 (MPS)."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


@dataclass(frozen=True)
class Sample:
    """Weighted values in groups; each group gets one step. Everything is float64.

    Attributes:
        values: ``(groups, n)``.
        weights: ``(groups, n)``, how often (or how strongly) each value counts; 0 for padding.
        minimum: ``(groups,)``, least value of the data.
        maximum: ``(groups,)``, greatest value of the data.
        mean_inputs: as ``mean`` of :class:`~lightning_qinit.functional.rows.Rows`, if errors are those of outputs.
        output: as there.
    """

    values: Tensor
    weights: Tensor
    minimum: Tensor = field(repr=False)
    maximum: Tensor = field(repr=False)
    mean_inputs: Tensor | None = field(default=None, repr=False)
    output: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of_tensor(cls, x: Tensor, channel_axis: int | None = None) -> "Sample":
        """The values of a tensor: one group, or one per index of ``channel_axis``."""
        rows = to_rows(x.detach().to(float64_device(x)), channel_axis)
        if rows.shape[1]:
            minimum, maximum = rows.amin(1), rows.amax(1)
        else:
            minimum = maximum = rows.new_zeros(len(rows))
        weights = torch.ones((), dtype=rows.dtype, device=rows.device).expand_as(rows)
        return cls(rows, weights, minimum, maximum)

    @classmethod
    def of_values(cls, values: Tensor, weights: Tensor) -> "Sample":
        """Weighted values, both ``(groups, n)`` in float64; the range is that of values that have a weight."""
        counts = weights > 0
        minimum = torch.where(counts, values, torch.inf).amin(1)
        maximum = torch.where(counts, values, -torch.inf).amax(1)
        return cls(values, weights, minimum, maximum)

    @property
    def rows(self) -> Rows:
        """What the solver takes."""
        return Rows(self.values, self.weights, self.mean_inputs, self.output)

    @cached_property
    def count(self) -> Tensor:
        """Total weight of each group, ``(groups,)``."""
        one_number = alike(self.weights) and self.weights.numel()
        return self.weights[:, 0] * self.weights.shape[1] if one_number else self.weights.sum(1)

    @cached_property
    def magnitude(self) -> Tensor:
        """Mean magnitude of each group's data, ``(groups,)``; 0 for a group without data."""
        return self.mean(self.values.abs())

    @cached_property
    def energy(self) -> Tensor:
        """Sum of squares of each group's data, ``(groups,)``."""
        return weighted(self.values.square(), self.weights)

    @property
    def root_mean_square(self) -> Tensor:
        """Of each group's data, ``(groups,)``; 0 for a group without data."""
        return (self.energy / torch.where(self.count > 0, self.count, 1.0)).sqrt()

    def mean(self, values: Tensor) -> Tensor:
        """Weighted mean over each group of ``values``, ``(groups, n)``; 0 for a group without data."""
        return weighted(values, self.weights) / torch.where(self.count > 0, self.count, 1.0)

    def deviation(self) -> Tensor:
        """Standard deviation of each group, ``(groups,)``."""
        mean = self.mean(self.values)
        return self.mean((self.values - mean[:, None]).square()).sqrt()

    @any_order()
    def quantile(self, share: float, magnitude: bool = False) -> Tensor:
        """The least value of each group (or magnitude) that at least ``share`` of its data do not exceed."""
        values, count = self.values.abs() if magnitude else self.values, self.values.shape[1]
        # sums round: a relative 1e-12 keeps an exact share from slipping to the next value
        if count and alike(self.weights):
            nth = min(max(1, math.ceil(share * count * (1 - 1e-12))), count)
            if nth > count / 2:  # from the top there are fewer to look for
                return values.topk(count + 1 - nth, dim=1).values[:, -1]
            return values.kthvalue(nth, dim=1).values
        values, order = values.sort(dim=1)
        below = self.weights.gather(1, order).cumsum(1)
        index = (below < share * below[:, -1:] * (1 - 1e-12)).sum(1, keepdim=True).clamp(max=count - 1)
        return values.gather(1, index)[:, 0]

    def shifted(self, offset: Tensor) -> "Sample":
        """The data minus an offset per group, ``(groups,)``."""
        offset = offset.to(self.values)
        values = self.values - offset[:, None]
        return Sample(values, self.weights, self.minimum - offset, self.maximum - offset)

    def error(self, levels: Tensor, scale: Tensor) -> Tensor:
        """Sum of squared quantization errors of each group at ``scale``, ``(groups,)``; of outputs, if it is those."""
        return squared_error(self.rows, levels.to(self.values.device), scale.to(self.values))

    def share_clipped(self, levels: Tensor, scale: Tensor) -> float:
        """The share of the data, over all groups, that lies beyond the outermost levels by over half a step."""
        scale = scale.to(self.values)[:, None]
        over = self.values > scale * (levels[-1] + (levels[-1] - levels[-2]) / 2)
        under = self.values < scale * (levels[0] - (levels[1] - levels[0]) / 2)
        return float(weighted(over | under, self.weights).sum() / self.count.sum().clamp(min=1))
