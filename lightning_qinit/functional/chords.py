"""Brackets for rows of few values, from a grid of steps.

The error is a minimum of parabolas in the step, ``S - 2 s A + s^2 B`` one for each assignment of points to levels (see
:mod:`~lightning_qinit.functional.sweep`), and ``B = sum w c^2`` only grows as ``s`` falls. So on an interval
``[lo, hi]`` of steps ``f(s) - B(lo) s^2`` is a minimum of concave functions: it lies above its chord. The least value
of that chord and the parabola, with ``d = |f(hi) - f(lo)|`` and ``C = B(lo) (hi - lo)^2``, gives

    f(s) >= min(f(lo), f(hi)) - max(C - d, 0)^2 / (4 C).

By the triangle inequality ``sqrt(B) s <= sqrt(S) + sqrt(f(s))``, so that errors are all that has to be computed.
Intervals that this does not exclude are split, and those that remain in the end are the brackets.

Beyond the grid, steps are excluded by what is clipped and by the dead zone, as in
:mod:`~lightning_qinit.functional.bracket`.
"""

import torch
from torch import Tensor

from lightning_qinit.functional.bracket import reach
from lightning_qinit.functional.errors import Errors, Grid
from lightning_qinit.functional.rows import Rows, squared_error
from lightning_qinit.functional.sweep import Bracket

FIRST = (2.0, 1.0, 0.5, 0.25, 0.125)  # where the grid may begin, in its units of the inverse step
MOST = 512  # where it ends
GAP = 0.25  # by how much its bound may lie below the error at a usual step, relative
EVERY = 4  # steps between two looks at what is clipped
ALL = 0.999  # of the energy
PARTS = 4  # that an interval is split into
SPLITS = 4  # how often at most
NARROW = 0.5  # how wide the intervals of a row may be in all, relative to the step and times the number of levels
BRACKETS = 16  # of a row at most; one around all if there were more
GLANCE = 128  # values of a row that a usual step is guessed from


def scan(rows: Rows, levels: Tensor, bracket: Bracket) -> tuple[Tensor, Bracket]:
    """Find brackets, one or several for each row, outside of which no step is the best.

    Where nothing is clipped the error grows about with ``s^2``, and so may the gap below the chord: a grid that is even
    in ``1 / s`` has one that does.

    Returns:
        The row that each bracket belongs to, in order, and the brackets: those of a row from the largest step down.
    """
    errors = Errors(rows, levels)
    grid, limit, end, closed = _grid(errors, bracket.upper)
    idle = grid.error.amin(0) >= ALL * errors.energy  # all zero, or of the sign that no level has: nothing to narrow
    ends = [
        (idle, bracket.lower, bracket.upper),
        (end.isinf() & ~idle, grid.step[0], bracket.upper),
        (~closed & ~idle, bracket.lower, grid.step[-1]),
    ]
    row = torch.arange(len(idle), device=idle.device)
    row, grid = _possible(row[~idle], Grid(*(part[:, ~idle] for part in grid)), errors.energy, limit, end)
    for _ in range(SPLITS):
        if float((grid.step[0] / grid.step[1] - 1).sum()) * len(levels) < NARROW * len(idle):
            break
        first, last = 1 / grid.step
        inner = errors.at(torch.stack([first + (last - first) * (i / PARTS) for i in range(1, PARTS)]), row)
        limit = torch.minimum(limit, _least(errors, row, inner))
        grid = Grid(*(torch.cat((a[:1], b, a[1:])) for a, b in zip(grid, inner, strict=True)))
        row, grid = _possible(row, grid, errors.energy, limit, end)
    pieces = [(row, grid.step[1], grid.step[0])]
    pieces += [(which.nonzero()[:, 0], low[which], high[which]) for which, low, high in ends]
    row, lower, upper = (torch.cat(part) for part in zip(*pieces, strict=True))
    return _joined(row, Bracket(lower, upper), bracket, len(levels))


def _grid(errors: Errors, other: Tensor) -> tuple[Grid, Tensor, Tensor, Tensor]:
    """The first grid of every row, down to where the best step cannot be.

    Args:
        errors: of the rows.
        other: a step for rows that no level is of use for.

    Returns:
        The grid; what the error at the best step is not above; the least step of the grid from which on the dead zone
        excludes all, infinite if none; and whether what is clipped excludes all below the grid.
    """
    usual = _usual(errors.rows, errors.levels, other)
    grid = errors.at((1 / usual)[None])
    limit = errors.reached(grid.step[0], grid.error[0])
    share = (grid.square[0] / errors.energy).nan_to_num(1.0)
    unit = 2 * (GAP * share).clamp(2.0**-18, 1.0).sqrt() / usual

    row = torch.arange(len(usual), device=usual.device)
    dead = []
    for k in FIRST:
        dead.append(errors.dead(k * unit))
        if bool((dead[-1] > limit).all()):
            break
    grid = errors.at(torch.stack([k * unit for k in FIRST[: len(dead)][::-1]]))
    for k in range(3, MOST, EVERY):
        more = errors.at(torch.stack([(k + i) * unit for i in range(EVERY)]))
        grid = Grid(*(torch.cat(pair) for pair in zip(grid, more, strict=True)))
        clipped = errors.clipped(grid.step[-1])
        if bool((clipped >= torch.minimum(grid.error.amin(0), ALL * errors.energy)).all()):
            limit = torch.minimum(limit, _least(errors, row, grid))
            if bool(((clipped > limit) | (limit >= errors.energy)).all()):  # the latter are never excluded
                break
    limit = torch.minimum(limit, _least(errors, row, grid))
    end = torch.where(torch.stack(dead[::-1]) > limit, grid.step[: len(dead)], torch.inf).amin(0)
    return grid, limit, end, clipped > limit


def _possible(row: Tensor, grid: Grid, energy: Tensor, limit: Tensor, end: Tensor) -> tuple[Tensor, Grid]:
    """The intervals of the grids whose bound is not above the limit, each as a grid of two steps, and their rows."""
    (high, low), size = (grid.square[:-1], grid.square[1:]), (grid.step[:-1] / grid.step[1:] - 1).square()
    c = (energy[row].sqrt() + low.sqrt()).square() * size
    dip = (c - (high - low).abs()).clamp(min=0).square() / (4 * c).clamp(min=torch.finfo(c.dtype).tiny)
    excluded = (torch.minimum(high, low) - dip > limit[row]) | (grid.step[1:] >= end[row])
    column, k = (~excluded).t().nonzero(as_tuple=True)
    return row[column], Grid(*(torch.stack((part[k, column], part[k + 1, column])) for part in grid))


def _least(errors: Errors, row: Tensor, grid: Grid) -> Tensor:
    """The least error reached by each row on the grids of its intervals."""
    error, index = grid.error.min(0, keepdim=True)
    step = grid.step.gather(0, index)[0]
    least = torch.full_like(errors.energy, torch.inf).scatter_reduce_(0, row, error[0], "amin")
    best = torch.where(error[0] == least[row], step, 0.0)
    best = torch.zeros_like(least).scatter_reduce_(0, row, best, "amax")
    return torch.where(best > 0, errors.reached(torch.where(best > 0, best, 1.0), least), torch.inf)


def _joined(row: Tensor, found: Bracket, within: Bracket, levels: int) -> tuple[Tensor, Bracket]:
    """Intervals in order, joined where they touch or nearly so: to sweep a little more is cheaper than once more."""
    order = found.upper.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row, lower, upper = row[order], found.lower[order], found.upper[order]
    other = torch.ones_like(row, dtype=torch.bool)
    other[1:] = row[1:] != row[:-1]
    apart = other.clone()
    apart[1:] |= upper[1:] < lower[:-1] * (1 - 1 / (3 * levels))
    counts = torch.zeros_like(within.lower).index_add_(0, row, apart.to(within.lower))
    index = (torch.where(counts[row] > BRACKETS, other, apart)).cumsum(0) - 1
    count = int(index[-1]) + 1
    row = torch.zeros(count, dtype=row.dtype, device=row.device).scatter_(0, index, row)
    lower = torch.full((count,), torch.inf).to(lower).scatter_reduce_(0, index, lower, "amin")
    upper = torch.zeros(count).to(upper).scatter_reduce_(0, index, upper, "amax")
    least, most = within.lower[row], within.upper[row]
    return row, Bracket(lower.clamp(least, most), upper.clamp(least, most))


def _usual(rows: Rows, levels: Tensor, other: Tensor) -> Tensor:
    """A step that is about the best of those that clip little; ``other`` where no level can be of use."""
    every = -(-rows.x.shape[1] // GLANCE)
    rows = Rows(rows.x[:, ::every].contiguous(), rows.w[:, ::every])
    widest = reach(rows.x, levels)
    steps = torch.where(widest > 0, widest, other.to(widest)) * 2.0 ** -torch.arange(4.0)[:, None].to(widest)
    errors = torch.stack([squared_error(rows, levels, step) for step in steps])
    return steps.double().gather(0, errors.argmin(0, keepdim=True))[0]
