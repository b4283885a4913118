"""Brackets that provably hold the best step, so that large tensors are solved exactly at little cost.

Write ``e(x) = x^2 + h(x)`` for the squared error of a value at step ``s``: ``h(x) = min_c (s^2 c^2 - 2 s c x)`` is
a minimum of linear functions, hence concave. Three bounds follow, ``best`` being any error already reached:

* Nodes. Split a value between the ends of its cell ``[lo, hi]`` in proportion, ``x = p lo + q hi``. By concavity
  ``e(x) >= p e(lo) + q e(hi) - (hi - x)(x - lo)``. Summed, ``f(s) >= g(s) - c``: ``g`` the error of the nodes
  with their masses, ``c = sum w (hi - x)(x - lo)`` the same for every step. Steps with ``g(s) > best + c`` are
  excluded. Half a million nodes or a hundred: the bound is as good as the cells are narrow.
* Clipping. Points beyond the outer levels cost ``(|x| - s |c|)^2``, which only grows as ``s`` falls. A step where
  this alone exceeds ``best + c`` excludes all smaller steps.
* Dead zone. Points nearest to level 0 stay there as ``s`` grows and cost ``x^2``. A step where this alone exceeds
  ``best + c`` excludes all larger steps.

Errors of outputs (``Rows.mean``) are never below the squared error, so that what excludes a step excludes it for them
too, ``best`` being an error of outputs then.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qinit.functional.nearest import nearest
from lightning_qinit.functional.rows import Rows, squared_error
from lightning_qinit.functional.sweep import Bracket, Counted, in_parts, sweep

OCTAVES = 16  # cells span the largest value of a row down to 2^-16 of it; all smaller values share the first cell
GRID = 2.0 ** -torch.linspace(-1, 5, 24, dtype=torch.float64)  # tried relative to the step that just clips nothing
NEARBY = ((0.9, 1.15, 1.35, 1.6, 1.9), (0.96, 0.98, 1.02, 1.04))  # tried relative to the best step until then
SLACK = 1e-12  # of the energy: far above the rounding of the sums, far below any error of 8 bits


class Nodes(NamedTuple):
    """A row's values moved to the ends of their cells: a lower bound ``g(s) - gap`` on the error."""

    rows: Rows
    gap: Tensor  # (rows,)


def nodes_per_row(mantissa_bits: int) -> int:
    """How many nodes :func:`gather` makes of a row."""
    return 2 * (OCTAVES * 2**mantissa_bits + 2)


def gather(rows: Rows, mantissa_bits: int) -> Nodes:
    """Split every value between the ends of its cell, cells keyed by sign, exponent and leading mantissa bits.

    Args:
        rows: values within ``[-1, 1]``.
        mantissa_bits: resolution; a cell is ``2^-mantissa_bits`` of its power of two wide.
    """
    half = nodes_per_row(mantissa_bits) // 2
    ends = _ends(mantissa_bits).to(rows.x.device)
    row = torch.arange(len(rows.x), device=rows.x.device)[:, None] * (2 * half)
    mass = torch.zeros(len(rows.x) * 2 * half, dtype=torch.float64, device=rows.x.device)
    gap = torch.zeros(len(rows.x), dtype=torch.float64, device=rows.x.device)
    for x, w, *_ in rows.chunks():
        size = x.abs()
        key = (size.contiguous().view(torch.int64) >> (52 - mantissa_bits)) - ((1023 - OCTAVES) << mantissa_bits)
        key = (key + 1).clamp_(0, half - 2)  # cell k reaches from ends[k] to ends[k + 1]
        low, high = ends[key], ends[key + 1]
        gap += (w * (high - size) * (size - low)).sum(1)
        share = w * ((size - low) / (high - low))
        index = (key + torch.where(x < 0, half, 0) + row).flatten()
        mass += torch.bincount(index, (w - share).flatten(), len(mass))
        mass[1:] += torch.bincount(index, share.flatten(), len(mass))[:-1]
    return Nodes(Rows(torch.cat((ends, -ends)).expand(len(rows.x), -1), mass.view(len(rows.x), -1)), gap)


def _ends(mantissa_bits: int) -> Tensor:
    """0, then every float64 of ``mantissa_bits`` from ``2^-OCTAVES`` to 1."""
    keys = torch.arange((1023 - OCTAVES) << mantissa_bits, (1023 << mantissa_bits) + 1) << (52 - mantissa_bits)
    return torch.cat((torch.zeros(1, dtype=torch.float64), keys.view(torch.float64)))


def reach(x: Tensor, levels: Tensor) -> Tensor:
    """The least step at which nothing is clipped, ``(rows,)``; 0 where no level lies on the side of the values."""
    least = torch.zeros_like(x[:, 0])
    for edge, level in ((x.amax(1), levels[-1]), (x.amin(1), levels[0])):
        least = torch.maximum(least, edge / level if level != 0 else torch.zeros_like(least))
    return least


def coarse(nodes: Nodes, rows: Rows, levels: Tensor, bracket: Bracket) -> Bracket:
    """Narrow a bracket by the clipping and the dead-zone bound on a geometric grid of steps."""
    (x, w, *_), gap = nodes
    widest = reach(x, levels)
    steps = torch.where(widest > 0, widest, bracket.upper)[:, None] * GRID.to(x.device)
    errors, clipping, dead = (torch.empty_like(steps) for _ in range(3))
    for i, step in enumerate(steps.split(1, dim=1)):
        level = nearest(x, step, levels)
        error = (x - step * level).square_().mul_(w)
        errors[:, i] = error.sum(1)
        clipping[:, i] = torch.where((x > step * levels[-1]) | (x < step * levels[0]), error, 0.0).sum(1)
        dead[:, i] = torch.where(level == 0, error, 0.0).sum(1)
    best = squared_error(rows, levels, steps.gather(1, errors.argmin(1, keepdim=True))[:, 0])
    limit = _limit(best, nodes)
    return Bracket(
        torch.maximum(bracket.lower, torch.where(clipping > limit, steps, 0.0).amax(1)),
        torch.minimum(bracket.upper, torch.where(dead > limit, steps, torch.inf).amin(1)),
    )


def fine(nodes: Nodes, rows: Rows, levels: Tensor, bracket: Bracket) -> Bracket:
    """Narrow a bracket to the hull of all steps that the nodes cannot exclude."""

    def solve(part: Rows, bracket: Bracket, counted: Counted | None, index: slice) -> tuple[Tensor, ...]:
        pieces = sweep(part, levels, bracket, counted)
        step, error = pieces.minima((part.w * part.x.square()).sum(1))
        best = step.gather(1, error.argmin(1, keepdim=True))[:, 0]
        best = error_reached(rows.take(index), levels, best)
        possible = error <= _limit(best, Nodes(part, nodes.gap[index]))
        lower = torch.where(possible, pieces.lower, torch.inf).amin(1)
        upper = torch.where(possible, pieces.upper, 0.0).amax(1)
        return lower, upper

    return Bracket(*in_parts(solve, nodes.rows, levels, bracket))


def error_reached(rows: Rows, levels: Tensor, step: Tensor) -> Tensor:
    """An error reached near the step of least squared error, ``(rows,)``; a low one, if it is that of outputs."""
    best = squared_error(rows, levels, step)
    for ratios in NEARBY if rows.mean is not None else ():
        start = step
        for ratio in ratios:
            error = squared_error(rows, levels, start * ratio)
            step = torch.where(error < best, start * ratio, step)
            best = torch.minimum(error, best)
    return best


def _limit(best: Tensor, nodes: Nodes) -> Tensor:
    energy = (nodes.rows.w * nodes.rows.x.square()).sum(1)
    return (best + nodes.gap + SLACK * energy)[:, None]
