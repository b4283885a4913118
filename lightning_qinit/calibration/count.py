"""Counting the values of a tensor by the leading bits of their float32 numbers."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qinit.functional.determinism import any_order

MANTISSA_BITS = 9  # kept of float32's 23: a key is at most 2^-9 of its value wide
LOW_BITS = 23 - MANTISSA_BITS
KEYS = 2 ** (32 - LOW_BITS)
_BLOCK = 2**MANTISSA_BITS  # the keys of one sign and exponent
FEW = 2**17  # up to so many values are kept one by one, which is cheaper than a table of them
_MANY = 2**23  # values that are summed in int64 at a time, each as its bits plus
_ONE = 2**38  # which is above what the low bits of so many come to
_ORDERED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what torch finds the extremes of


class Tally(NamedTuple):
    """What a tensor adds to a sketch.

    Attributes:
        keys: ``(n,)``; one may be there several times.
        sums: ``(2, n)``: how many values it stands for, and the sum of their low bits.
        extremes: ``(2,)`` float32: minus the least and the greatest finite value.
    """

    keys: Tensor
    sums: Tensor
    extremes: Tensor


class Counter:
    """Counts the values of tensors, in memory that it keeps.

    Several tables are filled side by side. On a CPU each core has its own, and takes as many values at a time as stay
    in its cache. On a GPU neighbouring values go to different tables, so that they seldom wait for each other, however
    many are equal (to zero).

    Args:
        device: where to count.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._on_cpu = self.device.type == "cpu"
        self._rows = min(torch.get_num_threads(), 8) if self._on_cpu else 32

    @torch.no_grad()
    @any_order()
    def count(self, x: Tensor) -> Tally:
        """Count the values of any floating-point tensor, rounded to float32."""
        values = in_memory_order(x.detach(), x).to(self.device)
        if len(values) > FEW:
            parts = [self._count(part) for part in values.split(_MANY)]
            return Tally(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], 1), extremes(values))
        keys, low = split(values)
        return Tally(keys, torch.stack((torch.ones_like(low), low)), extremes(values))

    @cached_property
    def _buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tables, empty but while counting, and the keys and bits of the values at hand."""
        most = self._rows * 2 ** (16 if self._on_cpu else 17)
        table = torch.zeros(self._rows * KEYS, dtype=torch.int64, device=self.device)
        return table, table.new_empty(most), table.new_empty(most)

    def _count(self, values: Tensor) -> tuple[Tensor, Tensor]:
        table, all_keys, all_bits = self._buffers
        rows = self._in_rows(table)
        for part in values.split(len(all_keys)):
            key, bits = all_keys[: len(part)], all_bits[: len(part)]
            bits.copy_(_bits(part))
            torch.bitwise_right_shift(bits, LOW_BITS, out=key)
            bits.add_(_ONE)
            even = len(part) - len(part) % self._rows
            rows.scatter_add_(1, self._in_rows(key[:even]), self._in_rows(bits[:even]))
            if even < len(part):
                rows[0].scatter_add_(0, key[even:], bits[even:])
        blocks = rows.view(self._rows, -1, _BLOCK)
        # most exponents never occur; but to ask a GPU which do would be to wait for it
        used = blocks.amax((0, 2)).nonzero()[:, 0] if self._on_cpu else slice(None)
        sums = blocks[:, used].sum(0).flatten()
        blocks[:, used] = 0
        first = torch.arange(0, KEYS, _BLOCK, device=self.device)[used]
        keys = (first[:, None] + torch.arange(_BLOCK, device=self.device)).flatten()
        one = (keys << LOW_BITS) + _ONE  # what the first number of a key adds
        return keys, torch.stack((sums // one, sums % one))

    def _in_rows(self, x: Tensor) -> Tensor:
        """A vector as one row per table: one after the other on a CPU, interleaved on a GPU."""
        return x.view(self._rows, -1) if self._on_cpu else x.view(-1, self._rows).t()


def in_memory_order(x: Tensor, like: Tensor) -> Tensor:
    """The elements of ``x`` as a vector, in the order in which those of ``like`` lie in memory: often a view."""
    return x.permute(sorted(range(x.dim()), key=like.stride, reverse=True)).flatten()


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """The key of every value, and its low bits, both int64."""
    bits = _bits(values).to(torch.int64)
    low = bits.bitwise_and(2**LOW_BITS - 1)
    return bits.bitwise_right_shift_(LOW_BITS), low


def _bits(values: Tensor) -> Tensor:
    """The float32 numbers of the values, read as uint32."""
    return values.to(torch.float32).contiguous().view(torch.uint32)


def extremes(values: Tensor) -> Tensor:
    """Minus the least and the greatest value that is finite in float32; minus infinity where there is none."""
    if not len(values):
        return torch.full((2,), -torch.inf, dtype=torch.float32, device=values.device)
    values = values if values.dtype in _ORDERED else values.to(torch.float32)
    low, high = (end.to(torch.float32) for end in values.aminmax())
    if values.is_cuda or not (bool(low.isfinite()) and bool(high.isfinite())):  # on a GPU asking would wait
        values = values.to(torch.float32)
        finite = values.isfinite()
        low = torch.where(finite, values, torch.inf).amin()
        high = torch.where(finite, values, -torch.inf).amax()
    return torch.stack((-low, high))
