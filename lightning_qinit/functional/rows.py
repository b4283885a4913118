"""Rows of values, each with a step of its own, and their errors."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qinit.functional.nearest import nearest

CHUNK = 2**18  # values at a time


def alike(w: Tensor) -> bool:
    """Whether all weights are one number, expanded."""
    return not any(w.stride())


def weighted(values: Tensor, w: Tensor) -> Tensor:
    """The weighted sum of every row, ``(rows,)``."""
    return values.sum(1) * w[0, 0] if alike(w) and values.numel() else (values * w).sum(1)


def at_once(values: int, x: Tensor) -> int:
    """How many values to take at a time, if so many are best for a core: what fits its cache, for each of them.

    More on a GPU, which has no cache to fit but waits for every operation.
    """
    return 32 * values if x.is_cuda else min(torch.get_num_threads(), 8) * values


class Rows(NamedTuple):
    """Values and what they count, ``(rows, n)`` in float64; each row has a step of its own.

    Attributes:
        x: the values.
        w: their weights; the variance of the inputs that they meet, if errors are those of outputs.
        mean: the mean of these inputs; ``None`` if errors are those of the values.
        output: int64, which output of its row each value feeds; ``None`` if there is one.
    """

    x: Tensor
    w: Tensor
    mean: Tensor | None = None
    output: Tensor | None = None

    def take(self, index: slice | Tensor) -> "Rows":
        """Some of the rows, by their numbers."""

        def some(part: Tensor | None) -> Tensor | None:
            if part is None or isinstance(index, slice):
                return None if part is None else part[index]
            return part[:1].expand(len(index), -1) if alike(part) else part.index_select(0, index)

        return Rows(*map(some, self))  # type: ignore[arg-type]

    def chunks(self) -> "list[Rows]":
        """Parts along the values, small enough to stay in the cache while something is summed over them."""
        size = max(1, at_once(CHUNK, self.x) // len(self.x))
        ends = range(0, self.x.shape[1], size)
        return [Rows(*(p if p is None else p[:, e : e + size] for p in self)) for e in ends]  # type: ignore[arg-type]

    def sums(self, values: Tensor) -> Tensor:
        """``values`` times the mean inputs, summed for every output: ``(rows, outputs)``."""
        assert self.mean is not None
        values = self.mean * values
        if self.output is None:
            return values.sum(1, keepdim=True)
        total = values.new_zeros(len(values), int(self.output.max()) + 1)
        return total.scatter_add_(1, self.output, values)

    def products(self, level: Tensor) -> Tensor:
        """``A`` and ``B`` of the values, each assigned to a level, ``(2, rows)``."""
        if alike(self.w):
            return torch.stack((torch.linalg.vecdot(self.x, level), torch.linalg.vecdot(level, level))) * self.w[0, 0]
        share = self.w * level
        return torch.stack((torch.linalg.vecdot(self.x, share), torch.linalg.vecdot(level, share)))

    def energy(self) -> Tensor:
        """``S``: the error where every level is 0, ``(rows,)``."""
        energy = weighted(self.x.square(), self.w)
        return energy if self.mean is None else energy + self.sums(self.x).square().sum(1)


def squared_error(rows: Rows, levels: Tensor, scale: Tensor) -> Tensor:
    """``f(scale)`` of every row; ``scale`` and the result are ``(rows,)``."""
    scale = scale[:, None]
    if rows.mean is not None:
        error = rows.x - scale * nearest(rows.x, scale, levels)
        return rows.sums(error).square().sum(1) + weighted(error.square_(), rows.w)
    total = torch.zeros_like(scale[:, 0])
    for part in rows.chunks():
        error = nearest(part.x, scale, levels).mul_(-scale).add_(part.x)
        total += weighted(error.square_(), part.w)
    return total
