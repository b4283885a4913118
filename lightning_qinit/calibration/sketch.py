"""A tensor's distribution in bounded memory, the same however the data is cut into batches or over ranks."""

import torch
from torch import Tensor

from lightning_qinit.calibration.count import (
    KEYS,
    LOW_BITS,
    MANTISSA_BITS,
    Counter,
    Tally,
    extremes,
    in_memory_order,
    split,
)
from lightning_qinit.functional.determinism import any_order
from lightning_qinit.functional.sample import Sample, float64_device

_CHUNK = 2**20  # weighted values taken at a time


class Sketch:
    """A histogram keyed by the leading bits of the float32 number itself: sign, exponent, 9 bits of mantissa.

    There is no range to guess and nothing to rescale. Each key holds a count and the sum of the remaining 14 bits, both
    as int64, so that merging is addition and therefore exact: any batch size, any order and any number of ranks give
    the same sketch, bit for bit. Counts hold up to 2^49 values per key. NaN and infinity have keys of their own, are
    counted and left out of the data. Memory: 4 MiB, whatever the data.

    Values are read as float32 (float64 input is rounded to it).

    A sketch of weighted data holds sums of weights instead of counts, in float64: the same up to rounding then.

    Args:
        device: where to sum.
        weighted: whether the data come with weights.

    Attributes:
        table: ``(2, 2^18)`` int64 (float64 if weighted): count and sum of the low bits, per key. All-reduce with SUM.
        extremes: ``(2,)`` float32: minus the least and the greatest finite value. All-reduce with MAX.
    """

    def __init__(self, device: torch.device | str = "cpu", weighted: bool = False) -> None:
        self.table = torch.zeros(2, KEYS, dtype=torch.float64 if weighted else torch.int64, device=device)
        self.extremes = torch.full((2,), -torch.inf, dtype=torch.float32, device=device)

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add all values of a floating-point tensor, with a weight each if the sketch is weighted."""
        if weights is None:
            self.add(Counter(self.table.device).count(x))
        elif x.numel():
            self._add_weighted(in_memory_order(x.detach(), x), in_memory_order(weights.detach(), x))

    @torch.no_grad()
    @any_order()
    def add(self, tally: Tally) -> None:
        """Add a tensor that was counted already."""
        self.table.scatter_add_(1, tally.keys.expand(2, -1), tally.sums)
        self.extremes = torch.maximum(self.extremes, tally.extremes)

    @torch.no_grad()
    @any_order()
    def _add_weighted(self, values: Tensor, weights: Tensor) -> None:
        for part, some in zip(values.split(_CHUNK), weights.split(_CHUNK), strict=True):
            part, weight = part.to(self.table.device), some.to(self.table)
            key, low = split(part)
            self.table.scatter_add_(1, key.expand(2, -1), torch.stack((weight, weight * low)))
            self.extremes = torch.maximum(self.extremes, extremes(part))

    def merge(self, other: "Sketch") -> None:
        """Add another sketch's data to this one."""
        self.table = self.table + other.table.to(self.table.device)
        self.extremes = torch.maximum(self.extremes, other.extremes.to(self.extremes.device))

    @property
    def count(self) -> int:
        """How many finite values were seen."""
        return int(self.table[0].sum()) - self.nonfinite

    @property
    def nonfinite(self) -> int:
        """How many values were NaN or infinite."""
        return int(_of_greatest_exponent(self.table[0]).sum())

    @property
    def minimum(self) -> float:
        """The least finite value seen, exact; infinity if none was."""
        return -float(self.extremes[0])

    @property
    def maximum(self) -> float:
        """The greatest finite value seen, exact; minus infinity if none was."""
        return float(self.extremes[1])

    @property
    def signed(self) -> bool:
        """Whether a negative value was seen, or nothing but zeros, which say nothing of a sign."""
        return self.minimum < 0 or self.maximum <= 0

    def sample(self) -> Sample:
        """The data as one group: each key's values as three about their mean, with the variance of evenly spread ones.

        Where the sum of a key is a multiple of its count, its values are taken to be all equal: so single values, and
        those of data that take few different ones, are kept exactly.
        """
        table = self.table.to(float64_device(self.table))
        used = table[0] > 0
        _of_greatest_exponent(used).fill_(False)
        keys = used.nonzero()[:, 0]
        count, total = table[:, keys].to(torch.float64)
        # as int32 bit patterns: the first number of each key and, by its neighbour, the worth of one low bit
        bits = (keys << LOW_BITS).to(torch.int32)
        start = bits.view(torch.float32).to(torch.float64)
        unit = (bits + 1).view(torch.float32).to(torch.float64) - start
        width, mean = float(2**LOW_BITS), total / count
        variance = (mean * (width - 1 - mean)).clamp(min=0, max=width**2 / 12) * (1 - 1 / count).clamp(min=0)
        variance = torch.where(total % count == 0, 0.0, variance)
        spread = unit.abs() * (variance * 1.5).sqrt()  # three points -1, 0, 1 have the variance 2/3
        mean = start + unit * mean
        values = torch.stack((mean - spread, mean, mean + spread)).flatten()
        extremes = self.extremes.to(table.device, torch.float64)
        return Sample(values[None], count.repeat(3)[None] / 3, -extremes[:1], extremes[1:])


def _of_greatest_exponent(values: Tensor) -> Tensor:
    """Of one value per key, those of NaN and infinity."""
    return values.view(2, -1, 2**MANTISSA_BITS)[:, -1]
