"""A tensor's distribution in bounded memory, the same however the data is cut into batches or over ranks."""

import torch
from torch import Tensor

from lightning_qinit.functional.determinism import any_order
from lightning_qinit.functional.sample import Sample, float64_device

MANTISSA_BITS = 9  # kept of float32's 23: a key is at most 2^-9 of its value wide
_LOW_BITS = 23 - MANTISSA_BITS
_KEYS = 2 ** (32 - _LOW_BITS)
_CHUNK = 2**18  # values taken at a time: few enough to stay in the cache
_PENDING = 2**22  # values whose count and sum fit side by side in an int64
_ONE = 2**40  # above the sum of that many low bits


class Sketch:
    """A histogram keyed by the leading bits of the float32 number itself: sign, exponent, 9 bits of mantissa.

    There is no range to guess and nothing to rescale. Each key holds a count and the sum of the remaining 14 bits, both
    as int64, so that merging is addition and therefore exact: any batch size, any order and any number of ranks give
    the same sketch, bit for bit. Counts hold up to 2^49 values per key. NaN and infinity have keys of their own, are
    counted and left out of the data. Memory: 6 MiB, whatever the data.

    Values are read as float32 (float64 input is rounded to it).

    A sketch of weighted data holds sums of weights instead of counts, in float64: the same up to rounding then.

    Args:
        device: where to sum.
        weighted: whether the data come with weights.

    Attributes:
        extremes: ``(2,)`` float32: minus the least and the greatest finite value. All-reduce with MAX.
    """

    def __init__(self, device: torch.device | str = "cpu", weighted: bool = False) -> None:
        self._table = torch.zeros(2, _KEYS, dtype=torch.float64 if weighted else torch.int64, device=device)
        self._packed = torch.zeros(_KEYS, dtype=torch.int64, device=device)  # count * 2^40 + sum of low bits
        self._pending = 0  # values in there
        self.extremes = torch.full((2,), -torch.inf, dtype=torch.float32, device=device)

    @property
    def table(self) -> Tensor:
        """``(2, 2^18)`` int64 (float64 if weighted): count and sum of the low bits, per key. All-reduce with SUM."""
        self._flush()
        return self._table

    @table.setter
    def table(self, table: Tensor) -> None:
        self._flush()
        self._table = table

    @torch.no_grad()
    @any_order()
    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add all values of a floating-point tensor, with a weight each if the sketch is weighted."""
        if x.numel() == 0:
            return
        values = x.detach().to(self.extremes.device, torch.float32).flatten()
        if weights is None:
            for part in values.split(_CHUNK):
                self._add(part)
        else:
            weights = weights.detach().to(self.extremes.device, torch.float64).flatten()
            for part, weight in zip(values.split(_CHUNK), weights.split(_CHUNK), strict=True):
                key, low = _split(part)
                self._table[0] += torch.bincount(key, weight, _KEYS)
                self._table[1] += torch.bincount(key, weight * low, _KEYS)
        low, high = values.aminmax()
        if values.is_cuda or not (bool(low.isfinite()) and bool(high.isfinite())):  # on a GPU asking would wait
            finite = values.isfinite()
            low = torch.where(finite, values, torch.inf).amin()
            high = torch.where(finite, values, -torch.inf).amax()
        self.extremes = torch.maximum(self.extremes, torch.stack((-low, high)))

    def _add(self, part: Tensor) -> None:
        if self._pending + len(part) > _PENDING:
            self._flush()
        self._pending += len(part)
        key, low = _split(part)
        self._packed.scatter_add_(0, key, low.add_(_ONE))

    def _flush(self) -> None:
        if self._pending:
            self._table[0] += self._packed >> 40
            self._table[1] += self._packed.bitwise_and_(_ONE - 1)
            self._packed.zero_()
            self._pending = 0

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
        """The data as one group: each key's values as three about their mean, with the variance of evenly spread ones.

        Where the sum of a key is a multiple of its count, its values are taken to be all equal: so single values, and
        those of data that take few different ones, are kept exactly.
        """
        table = self.table.to(float64_device(self.table))
        keys = torch.arange(_KEYS, device=table.device)
        used = (table[0] > 0) & ((keys >> MANTISSA_BITS & 0xFF) != 0xFF)
        count, total = table[:, used].to(torch.float64)
        # as int32 bit patterns: the first number of each key and, by its neighbour, the worth of one low bit
        bits = (keys[used] << _LOW_BITS).to(torch.int32)
        start = bits.view(torch.float32).to(torch.float64)
        unit = (bits + 1).view(torch.float32).to(torch.float64) - start
        width, mean = float(2**_LOW_BITS), total / count
        variance = (mean * (width - 1 - mean)).clamp(min=0, max=width**2 / 12) * (1 - 1 / count).clamp(min=0)
        variance = torch.where(total % count == 0, 0.0, variance)
        spread = unit.abs() * (variance * 1.5).sqrt()  # three points -1, 0, 1 have the variance 2/3
        mean = start + unit * mean
        values = torch.stack((mean - spread, mean, mean + spread)).flatten()
        extremes = self.extremes.to(table.device, torch.float64)
        return Sample(values[None], count.repeat(3)[None] / 3, -extremes[:1], extremes[1:])


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """The key of every float32 value, and its low bits, both int64."""
    bits = values.contiguous().view(torch.int32).to(torch.int64)
    low = bits.bitwise_and(2**_LOW_BITS - 1)
    return bits.bitwise_right_shift_(_LOW_BITS).bitwise_and_(_KEYS - 1), low
