"""A tensor's distribution in bounded memory, the same however the data is cut into batches or over ranks."""

import torch
from torch import Tensor

from lightning_qinit.functional.determinism import any_order
from lightning_qinit.functional.sample import Sample, float64_device

MANTISSA_BITS = 9  # kept of float32's 23: a key is at most 2^-9 of its value wide
_LOW_BITS = 23 - MANTISSA_BITS
_KEYS = 2 ** (32 - _LOW_BITS)
_CHUNK = 2**18  # values taken at a time: bounds memory, keeps every float64 sum below exact, and fits the cache


class Sketch:
    """A histogram keyed by the leading bits of the float32 number itself: sign, exponent, 9 bits of mantissa.

    There is no range to guess and nothing to rescale. Each key holds a count and the sums of the remaining 14 bits
    and of their squares, all as int64, so that merging is addition and therefore exact: any batch size, any order
    and any number of ranks give the same sketch, bit for bit. Counts hold up to 2^35 values per key. NaN and
    infinity have keys of their own, are counted and left out of the data. Memory: 6 MiB, whatever the data.

    Values are read as float32 (float64 input is rounded to it).

    A sketch of weighted data holds sums of weights instead of counts, in float64: the same up to rounding then.

    Args:
        device: where to sum.
        weighted: whether the data come with weights.

    Attributes:
        table: ``(3, 2^18)`` int64 (float64 if weighted): count, sum and sum of squares of the low bits, per key.
            All-reduce with SUM.
        extremes: ``(2,)`` float32: minus the least and the greatest finite value. All-reduce with MAX.
    """

    def __init__(self, device: torch.device | str = "cpu", weighted: bool = False) -> None:
        self.table = torch.zeros(3, _KEYS, dtype=torch.float64 if weighted else torch.int64, device=device)
        self.extremes = torch.full((2,), -torch.inf, dtype=torch.float32, device=device)

    @torch.no_grad()
    @any_order()
    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add all values of a floating-point tensor, with a weight each if the sketch is weighted."""
        if x.numel() == 0:
            return
        parts = x.detach().to(self.table.device, torch.float32).flatten().split(_CHUNK)
        if weights is None:
            weight_parts: tuple[Tensor | None, ...] = (None,) * len(parts)
        else:
            weight_parts = weights.detach().to(self.table.device, torch.float64).flatten().split(_CHUNK)
        for part, weight in zip(parts, weight_parts, strict=True):
            bits = part.contiguous().view(torch.int32)
            key = (bits >> _LOW_BITS).bitwise_and_(_KEYS - 1)
            low = bits.bitwise_and(2**_LOW_BITS - 1).to(torch.float64)
            if weight is None:
                self.table[0] += torch.bincount(key, minlength=_KEYS)
                # whole numbers in float64, below 2^53: exact, whatever the order of summation
                self.table[1] += torch.bincount(key, low, _KEYS).to(torch.int64)
                self.table[2] += torch.bincount(key, low.square_(), _KEYS).to(torch.int64)
            else:
                self.table[0] += torch.bincount(key, weight, _KEYS)
                self.table[1] += torch.bincount(key, weight * low, _KEYS)
                self.table[2] += torch.bincount(key, weight * low.square_(), _KEYS)
            finite = part.isfinite()
            low, high = torch.where(finite, part, torch.inf).amin(), torch.where(finite, part, -torch.inf).amax()
            self.extremes = torch.maximum(self.extremes, torch.stack((-low, high)))

    def merge(self, other: "Sketch") -> None:
        """Add another sketch's data to this one."""
        self.table += other.table.to(self.table.device)
        self.extremes = torch.maximum(self.extremes, other.extremes.to(self.extremes.device))

    @property
    def count(self) -> int:
        """How many finite values were seen."""
        return int(self.table[0].sum()) - self.nonfinite

    @property
    def nonfinite(self) -> int:
        """How many values were NaN or infinite."""
        exponent = torch.arange(_KEYS, device=self.table.device) >> MANTISSA_BITS & 0xFF
        return int(self.table[0, exponent == 0xFF].sum())

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
        """The data as one group: each key's values as three, evenly spread about their mean.

        This keeps the count, the sum and the sum of squares of every key, and values that stand alone exactly.
        """
        table = self.table.to(float64_device(self.table))
        keys = torch.arange(_KEYS, device=table.device)
        used = (table[0] > 0) & ((keys >> MANTISSA_BITS & 0xFF) != 0xFF)
        count, first, second = table[:, used].to(torch.float64)
        # as int32 bit patterns: the first number of each key and, by its neighbour, the worth of one low bit
        bits = (keys[used] << _LOW_BITS).to(torch.int32)
        start = bits.view(torch.float32).to(torch.float64)
        unit = (bits + 1).view(torch.float32).to(torch.float64) - start
        mean = start + unit * (first / count)
        deviation = unit.abs() * (second / count - (first / count).square()).clamp(min=0).sqrt()
        spread = deviation * 1.5**0.5  # three points -1, 0, 1 have the variance 2/3
        values = torch.stack((mean - spread, mean, mean + spread)).flatten()
        extremes = self.extremes.to(table.device, torch.float64)
        return Sample(values[None], count.repeat(3)[None] / 3, -extremes[:1], extremes[1:])
