"""Counting the values of a tensor by the leading bits of their float32 numbers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
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

    On a CPU up to eight threads fill a table each, a part that stays in the cache at a time. They take parts as they
    come and never wait for one another, so that a core which is busy otherwise (loading data) delays nobody; torch's
    own threads would wait after every operation. On a GPU neighbouring values go to different tables, so that they
    seldom wait for each other, however many are equal (to zero).

    Args:
        device: where to count.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._on_cpu = self.device.type == "cpu"
        self._tables = min(torch.get_num_threads(), 8) if self._on_cpu else 32
        self._part = 2**15 if self._on_cpu else 2**21  # torch spreads more than 2^15 over its own threads

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
    @torch.inference_mode(False)
    def _rows(self) -> Tensor:
        """The tables, ``(tables, KEYS)``: one after the other on a CPU, interleaved on a GPU; zero between counts."""
        table = torch.zeros(self._tables * KEYS, dtype=torch.int64, device=self.device)
        return table.view(self._tables, -1) if self._on_cpu else _interleaved(table, self._tables)

    @cached_property
    @torch.inference_mode(False)
    def _buffers(self) -> Tensor:
        """Keys and bits of a part, for each thread."""
        threads = self._tables if self._on_cpu else 1
        return torch.empty(threads, 2, self._part, dtype=torch.int64, device=self.device)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._tables - 1)

    def _count(self, values: Tensor) -> tuple[Tensor, Tensor]:
        rows, parts = self._rows, iter(values.split(self._part))
        mine = rows.split(1) if self._on_cpu else (rows,)
        fills = [partial(_fill, some, buffers, parts) for some, buffers in zip(mine, self._buffers, strict=True)]
        others = [self._pool.submit(fill) for fill in fills[1:]]
        fills[0]()
        for other in others:
            if not other.cancel():  # it began in time
                other.result()
        blocks = rows.view(len(rows), -1, _BLOCK)
        # most exponents never occur; but to ask a GPU which do would be to wait for it
        used = blocks.amax((0, 2)).nonzero()[:, 0] if self._on_cpu else slice(None)
        sums = blocks[:, used].sum(0).flatten()
        blocks[:, used] = 0
        first = torch.arange(0, KEYS, _BLOCK, device=self.device)[used]
        keys = (first[:, None] + torch.arange(_BLOCK, device=self.device)).flatten()
        one = (keys << LOW_BITS).to(torch.int32).to(torch.int64) + _ONE  # what the first number of a key adds
        return keys, torch.stack((sums // one, sums % one))


@torch.no_grad()
def _fill(rows: Tensor, buffers: Tensor, parts: Iterator[Tensor]) -> None:
    """Add the bits of values to tables, ``(tables, KEYS)``, until there are no more parts."""
    tables = len(rows)
    for part in parts:
        key, bits = buffers[:, : len(part)]
        bits.copy_(part.to(torch.float32).contiguous().view(torch.int32)).add_(_ONE)
        torch.bitwise_right_shift(bits, LOW_BITS, out=key).bitwise_and_(KEYS - 1)
        even = len(part) - len(part) % tables
        rows.scatter_add_(1, _interleaved(key[:even], tables), _interleaved(bits[:even], tables))
        if even < len(part):
            rows[0].scatter_add_(0, key[even:], bits[even:])


def _interleaved(x: Tensor, rows: int) -> Tensor:
    """A vector as rows that take its elements in turns."""
    return x.view(-1, rows).t()


def in_memory_order(x: Tensor, like: Tensor) -> Tensor:
    """The elements of ``x`` as a vector, in the order in which those of ``like`` lie in memory: often a view."""
    return x.permute(sorted(range(x.dim()), key=like.stride, reverse=True)).flatten()


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """The key of every value, and its low bits, both int64."""
    bits = values.to(torch.float32).contiguous().view(torch.int32).to(torch.int64)
    low = bits.bitwise_and(2**LOW_BITS - 1)
    return bits.bitwise_right_shift_(LOW_BITS).bitwise_and_(KEYS - 1), low


def extremes(values: Tensor) -> Tensor:
    """Minus the least and the greatest value that is finite in float32; minus infinity where there is none."""
    if not len(values):
        return torch.full((2,), -torch.inf, device=values.device)
    values = values if values.dtype in _ORDERED else values.to(torch.float32)
    low, high = (end.to(torch.float32) for end in values.aminmax())
    if values.is_cuda or not (bool(low.isfinite()) and bool(high.isfinite())):  # on a GPU asking would wait
        values = values.to(torch.float32)
        finite = values.isfinite()
        low = torch.where(finite, values, torch.inf).amin()
        high = torch.where(finite, values, -torch.inf).amax()
    return torch.stack((-low, high))
