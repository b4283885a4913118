"""What each quantizer does while training, measured on the values that training sees."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_qinit.functional.levels import thresholds
from lightning_qinit.functional.optimal import solve_rows
from lightning_qinit.functional.rows import Rows
from lightning_qinit.functional.sample import float64_device
from lightning_qinit.insertion import QuantizedLayer, named_quantizers
from lightning_qinit.monitoring.codes import normalized
from lightning_qinit.monitoring.metrics import (
    quantization_error_compute,
    quantization_error_update,
    sqnr_db_compute,
)
from lightning_qinit.monitoring.oscillation import Tracker
from lightning_qinit.monitoring.quantities import DEFAULT, PREFIXES, Quantity, aggregates
from lightning_qinit.quantizers import Quantizer

MOST_LEVELS = 256
VALUES = 8192  # at most so many values of a tensor are drawn
OPTIMUM_VALUES = 2048  # and so many are solved for the step that would be optimal now


class Monitor:
    """Measures the quantizers, on the batches between :meth:`open` and :meth:`close` only.

    Measuring happens on the values that pass through the quantizers, as they do, and nothing is copied from the device
    before :meth:`close`, which takes all numbers in one transfer.

    Args:
        layers: the layers to watch.
        quantities: what to measure.
        costly_every: measure ``"to_optimal"`` on every so many-th logging step only.
        tracker: what follows the oscillation of weights, for ``"oscillation"`` and ``"frozen"``.

    Attributes:
        counts: how many values each level of a quantizer had when last measured, over all ranks.
        keep: names of quantizers of whose values some are kept, for pictures.
        kept: those of the last logging step, ``(groups, values)``.
    """

    def __init__(
        self,
        layers: Mapping[str, QuantizedLayer],
        quantities: Sequence[Quantity] = DEFAULT,
        costly_every: int = 1,
        tracker: Tracker | None = None,
    ) -> None:
        self.quantizers = named_quantizers(layers)
        self.quantities = tuple(quantities)
        self.costly_every = costly_every
        self.counts: dict[str, Tensor] = {}
        self.tracker = tracker
        self.keep: frozenset[str] = frozenset()
        self.kept: dict[str, Tensor] = {}
        self._open = self._paused = False
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._states: dict[str, Tensor] = {}
        self._codes: dict[str, Tensor] = {}  # of the last logging step
        self._new_codes: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}  # in units of the step, ``(groups, values)``
        self._closed = 0

    @property
    def is_costly(self) -> bool:
        """Whether the next logging step is one on which the costly quantities are measured."""
        return self._closed % self.costly_every == 0

    def open(self) -> None:
        """Start measuring; a second call before :meth:`close` goes on (gradient accumulation)."""
        if not self._open:
            for name, quantizer in self.quantizers.items():
                quantizer.watch = partial(self._add, name)
            self._open = True

    def pause(self) -> None:
        """Leave what runs until :meth:`resume` out of a measurement that is open."""
        paused = self._open
        self.stop()
        self._paused = paused

    def resume(self) -> None:
        """Go on, if a measurement was paused."""
        if self._paused:
            self.open()
            self._paused = False

    def stop(self) -> None:
        """Stop measuring, whatever was measured."""
        for quantizer in self.quantizers.values():
            quantizer.watch = None
        self._open = self._paused = False

    def close(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Stop measuring and return what was measured by its logged name.

        Args:
            reduce: sums a tensor over all ranks.
        """
        self.stop()
        names = list(self.quantizers)
        device = self.quantizers[names[0]].initial_step.device
        # ranks may have run different layers; all reduce the same tensor
        zeros, no_counts = (torch.zeros(n, dtype=torch.float32, device=device) for n in (5, MOST_LEVELS))
        sums = torch.stack([self._sums.get(name, zeros) for name in names])
        counts = torch.stack([self._counts.get(name, no_counts) for name in names])
        ratios = self._to_optimal(device)
        totals = reduce(torch.cat((sums, counts, ratios), dim=1))
        states = torch.stack([self._states.get(name, _state(q)) for name, q in self.quantizers.items()])
        rates = torch.stack([self._rates(name, device) for name in names])
        sums, counts, ratios = totals.split((5, MOST_LEVELS, 2), dim=1)
        noise, signal = sums[:, 0], sums[:, 1]
        derived = torch.stack((quantization_error_compute(noise, signal), sqnr_db_compute(noise, signal)), dim=1)
        used = (counts > 0).sum(1, keepdim=True)
        table = torch.cat((sums, ratios, states, rates, derived, used.to(sums)), dim=1).tolist()
        self.counts = dict(zip(names, counts, strict=True))
        self._sums, self._counts, self._values, self._states = {}, {}, {}, {}
        self._codes, self._new_codes = {**self._codes, **self._new_codes}, {}
        self._closed += 1
        values: dict[str, float] = {}
        errors = []
        for name, row in zip(names, table, strict=True):
            quantizer = self.quantizers[name]
            if not quantizer.active:
                continue
            _, signal, clipped, count, still, ratio, ranks, step, drift, offset, rate, frozen, error, sqnr, used = row
            seen = signal > 0
            measured: dict[Quantity, float | None] = {
                "step": step,
                "drift": drift,
                "offset": offset if quantizer.has_offset else None,
                "error": error if seen else None,
                "sqnr_db": sqnr if seen and error > 0 else None,  # loggers cannot draw infinity
                "clipped": clipped / count if seen else None,
                "levels_used": used / len(quantizer.levels) if seen else None,
                "still": still / count if seen and still >= 0 and quantizer.batch_axis is None else None,
                "to_optimal": ratio / ranks if ranks > 0 else None,
                "oscillation": rate if rate >= 0 else None,
                "frozen": frozen if frozen >= 0 else None,
            }
            for quantity in self.quantities:
                if (value := measured[quantity]) is not None:
                    values[f"{PREFIXES[quantity]}/{name}"] = value
            errors += [error] if seen else []
        return {**values, **aggregates(errors)}

    @torch.no_grad()
    def _add(self, name: str, quantizer: Quantizer, x: Tensor, output: Tensor) -> None:
        x = quantizer.transform(x if x.dtype == torch.float64 else x.float())
        v, levels = normalized(quantizer, x).contiguous(), quantizer.levels
        cell = _cells(v, levels)
        filled = torch.bincount(cell.flatten(), minlength=len(levels) + 2).float()
        counts = filled.new_zeros(MOST_LEVELS)
        counts[: len(levels)] = filled[1:-1]
        counts[0] += filled[0]
        counts[len(levels) - 1] += filled[-1]
        still = filled.new_zeros(())
        if quantizer.batch_axis is None and "still" in self.quantities:
            code = (cell - 1).clamp_(0, len(levels) - 1).to(torch.uint8)
            before = self._codes.get(name)
            still = (code == before).sum() if before is not None else still - code.numel()  # marks the first time
            self._new_codes[name] = code
        noise, signal = quantization_error_update(output, x)
        sums = torch.stack(
            [part.float() for part in (noise, signal, filled[0] + filled[-1], noise.new_tensor(x.numel()), still)]
        )
        self._states[name] = _state(quantizer)  # as used: the optimizer moves it before this is logged
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts
        if name in self.keep:
            self.kept[name] = subsample(x, quantizer)
        if "to_optimal" in self.quantities and self.is_costly and name not in self._values:
            self._values[name] = subsample(v, quantizer, OPTIMUM_VALUES)

    def _rates(self, name: str, device: torch.device) -> Tensor:
        """The mean rate of oscillation and the share that is frozen, ``(2,)``; -1 where they are not followed."""
        none = torch.full((), -1.0, dtype=torch.float32, device=device)
        if self.tracker is None or name not in self.tracker.oscillation:
            return torch.stack((none, none))
        rate, frozen = self.tracker.oscillation[name].rate.mean(), self.tracker.frozen.get(name)
        return torch.stack((rate, none if frozen is None else (frozen >= 0).float().mean()))

    def _to_optimal(self, device: torch.device) -> Tensor:
        """Steps relative to the optimal ones on this rank's values, and 1; zeros where it was not measured."""
        ratios = {name: torch.zeros(2, dtype=torch.float32, device=device) for name in self.quantizers}
        alike: dict[tuple[float, ...], list[str]] = {}
        for name in self._values:
            alike.setdefault(tuple(self.quantizers[name].levels.tolist()), []).append(name)
        for levels, names in alike.items():  # all groups of one level set at once
            rows = [self._values[name].to(float64_device(self._values[name])).double() for name in names]
            width = max(row.shape[1] for row in rows)
            values = torch.cat([nn.functional.pad(row, (0, width - row.shape[1])) for row in rows])
            weights = torch.cat([nn.functional.pad(torch.ones_like(r), (0, width - r.shape[1])) for r in rows])
            level_set = torch.tensor(levels, dtype=torch.float64, device=values.device)
            finite = values.isfinite()
            best = solve_rows(Rows(torch.where(finite, values, 0.0), weights * finite), level_set).scale
            for name, scale in zip(names, best.split([len(row) for row in rows]), strict=True):
                ratios[name] = torch.stack((1 / scale, torch.ones_like(scale))).mean(1).to(device, torch.float32)
        return torch.stack(list(ratios.values()))


def _cells(v: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level, from 1 on; 0 and the last for values more than half a step beyond the outermost."""
    if bool((levels.diff() == 1).all()):
        return (v + (1.5 - float(levels[0]))).floor_().clamp_(0, len(levels) + 1).nan_to_num_(0).long()
    low, high = levels[:1] - (levels[1:2] - levels[:1]) / 2, levels[-1:] + (levels[-1:] - levels[-2:-1]) / 2
    return torch.bucketize(v, torch.cat((low, thresholds(levels), high)).to(v), right=True)


def _state(quantizer: Quantizer) -> Tensor:
    """Step, drift and offset: the means over channels."""
    step = quantizer.step.detach()
    offset = torch.zeros_like(step) if quantizer.offset is None else quantizer.offset.detach()
    return torch.stack((step.mean(), (step / quantizer.initial_step).mean(), offset.mean()))


def channels(count: int) -> Tensor:
    """At most 16 channels, evenly spread."""
    return torch.linspace(0, count - 1, min(count, 16), dtype=torch.float64).round().long()


def subsample(x: Tensor, quantizer: Quantizer, most: int = VALUES) -> Tensor:
    """Some channels, or one group, and at most about ``most`` evenly spread values in all: ``(groups, values)``."""
    if quantizer.channel_axis is None or quantizer.initial_step.numel() == 1:
        rows = x.reshape(1, -1)
    else:
        rows = x.movedim(quantizer.channel_axis, 0).flatten(1)
        rows = rows[channels(len(rows)).to(rows.device)]
    stride = (rows.numel() // most) | 1  # odd, so that it does not keep step with the rows of an image
    return rows[:, ::stride].clone()
