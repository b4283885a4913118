"""A bracket for rows of few values, from a grid of steps.

The error is a minimum of parabolas in the step, ``S - 2 s A + s^2 B`` one for each assignment of points to levels (see
:mod:`~lightning_qinit.functional.sweep`), and ``B = sum w c^2`` only grows as ``s`` falls. So on an interval
``[lo, hi]`` of steps ``f(s) - B(lo) s^2`` is a minimum of concave functions: it lies above its chord, and hence

    f(s) >= min(f(lo), f(hi)) - B(lo) (hi - lo)^2 / 4.

Beyond the grid, steps are excluded by what is clipped and by the dead zone, as in
:mod:`~lightning_qinit.functional.bracket`.
"""

import torch
from torch import Tensor

from lightning_qinit.functional.bracket import SLACK, reach
from lightning_qinit.functional.levels import is_run
from lightning_qinit.functional.sweep import Bracket, Rows, at_once, nearest_level, squared_error

MOST = 512  # steps of a grid
GAP = 0.25  # by how much the bound may lie below the error at a usual step, relative
EVERY = 4  # steps between two looks at what is clipped
FINER = 32  # intervals of a second grid, inside the first hull
CHUNK = 2**17  # values at a time
COARSE = 32  # levels up to which errors are so large that float32 tells them apart
ROUNDING = {torch.float32: 2.0**-18, torch.float64: SLACK}  # of sums, relative to the energy


def scan(rows: Rows, levels: Tensor, bracket: Bracket) -> Bracket:
    """Narrow a bracket to the hull of all steps that a grid cannot exclude.

    Where nothing is clipped the error grows about with ``s^2``, and so may the gap below the chord: a grid that is even
    in ``1 / s`` has one that does.
    """
    group = max(1, at_once(CHUNK, rows.x) // rows.x.shape[1])
    cut = [slice(first, first + group) for first in range(0, len(rows.x), group)]
    parts = [_scan(rows.take(index), levels, Bracket(*(end[index] for end in bracket))) for index in cut]
    return Bracket(*(torch.cat(ends) for ends in zip(*parts, strict=True)))


def _scan(rows: Rows, levels: Tensor, bracket: Bracket) -> Bracket:
    rows = _as(torch.float32 if len(levels) <= COARSE else torch.float64, rows)
    errors = _Errors(rows, levels)
    usual, error = _usual(errors.plain, levels, bracket.upper)
    unit = 2 * (GAP * error / errors.energy).nan_to_num(1.0, 1.0, 1.0).clamp(2.0**-18, 1.0).sqrt() / usual

    dead: list[Tensor] = []
    limit = torch.full_like(errors.energy, torch.inf)
    for k in (0.125, 0.25, 0.5, *range(1, MOST + 1)):
        errors.add(k * unit)
        if k < 1 or len(dead) == len(errors.step) - 1 and bool((dead[-1] > error).any()):
            dead.append(torch.where(errors.level == 0, errors.weighted * rows.x, 0.0).sum(1).double())
        if k % EVERY == 0:
            clipped = errors.clipped()
            if bool((clipped > errors.least).all()):
                limit = errors.reached()
            if bool((clipped > limit).all()):
                break
    limit = errors.reached()
    ends = torch.stack(dead) > limit
    end = torch.where(ends, torch.stack(errors.step[: len(dead)]), torch.inf).amin(0)
    hull = errors.hull(limit, end)
    bracket = Bracket(
        torch.maximum(bracket.lower, torch.where(errors.clipped() > limit, hull.lower, 0.0)),
        torch.minimum(bracket.upper, torch.where(ends[0], hull.upper, torch.inf)),
    )

    errors.forget()
    first, last = 1 / bracket.upper, 1 / bracket.lower
    for k in range(FINER + 1):
        errors.add(first + (last - first) * (k / FINER))
    hull = errors.hull(torch.minimum(limit, errors.reached()), bracket.upper)
    return Bracket(torch.maximum(bracket.lower, hull.lower), torch.minimum(bracket.upper, hull.upper))


class _Errors:
    """Errors at a grid of falling steps, and the ``B`` of each; ``(rows,)`` all."""

    def __init__(self, rows: Rows, levels: Tensor) -> None:
        self.rows, self.plain = rows, Rows(rows.x, rows.w)
        self.levels, self.run = levels.to(rows.x.dtype), is_run(levels)
        self.outer = float(levels[0]), float(levels[-1])
        self.weighted = rows.w * rows.x
        self.energy = (self.weighted * rows.x).sum(1).double()
        self.alike = not any(rows.w.stride())  # one weight for all
        self.level = torch.empty_like(rows.x)
        self.sums = None if rows.mean is None else rows.sums(rows.x)
        self.forget()

    def forget(self) -> None:
        """Begin another grid."""
        self.step: list[Tensor] = []
        self.error: list[Tensor] = []
        self.b: list[Tensor] = []
        self.best, self.least = self.energy, torch.full_like(self.energy, torch.inf)

    def add(self, inverse: Tensor) -> None:
        """The error at the step ``1 / inverse``."""
        inverse, level = inverse.to(self.rows.x.dtype), self.level
        step = 1 / inverse.double()
        torch.mul(self.rows.x, inverse[:, None], out=level)
        if self.run:
            level.round_().clamp_(*self.outer)
        else:
            level.copy_(nearest_level(level, self.levels))
        a = (self.weighted * level).sum(1)
        squares = level * level
        b = squares.sum(1) * self.rows.w[:, 0] if self.alike else squares.mul_(self.rows.w).sum(1)
        self.step.append(step)
        self.error.append(self.energy - 2 * step * a.double() + step.square() * b.double())
        self.b.append(b.double())
        error = self.error[-1]
        if self.sums is not None:
            bias = self.sums.double() - step[:, None] * self.rows.sums(level).double()
            error = error + bias.square().sum(1)
        self.best = torch.where(error < self.least, step, self.best)
        self.least = torch.minimum(error, self.least)

    def reached(self) -> Tensor:
        """An error that a step of the grid has, or one of outputs that it has but for levels that are equally near."""
        error = self.least
        if self.sums is not None:
            error = squared_error(self.rows, self.levels, self.best.to(self.rows.x.dtype)).double()
        return error + ROUNDING[self.rows.x.dtype] * self.energy

    def clipped(self) -> Tensor:
        """At the last step, the error of the points beyond the outer levels, which only grows as the step falls."""
        x, step = self.rows.x, self.step[-1][:, None].to(self.rows.x.dtype)
        over = (x - step * self.outer[1]).clamp_(min=0).maximum(step * self.outer[0] - x)
        return over.mul_(over).mul_(self.rows.w).sum(1).double()

    def hull(self, limit: Tensor, end: Tensor) -> Bracket:
        """Of the intervals below ``end`` whose bound is not above the limit."""
        step, error, b = (torch.stack(values) for values in (self.step, self.error, self.b))
        bound = torch.minimum(error[:-1], error[1:]) - b[1:] * (step[:-1] - step[1:]).square() / 4
        possible = (bound <= limit) & (step[1:] < end)
        return Bracket(
            torch.where(possible, step[1:], torch.inf).amin(0), torch.where(possible, step[:-1], 0.0).amax(0)
        )


def _usual(rows: Rows, levels: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The best of a few steps, and its error: of those that clip little; ``other`` where no level can be of use."""
    widest = reach(rows.x, levels.to(rows.x.dtype))
    steps = torch.where(widest > 0, widest, other.to(widest)) * 2.0 ** -torch.arange(4.0)[:, None].to(widest)
    errors = torch.stack([squared_error(rows, levels.to(rows.x.dtype), step) for step in steps])
    error, index = errors.double().min(0, keepdim=True)
    return steps.double().gather(0, index)[0], error[0]


def _as(dtype: torch.dtype, rows: Rows) -> Rows:
    w = rows.w.to(dtype) if any(rows.w.stride()) else rows.w[:1, :1].to(dtype).expand_as(rows.w)
    return rows._replace(x=rows.x.to(dtype), w=w, mean=None if rows.mean is None else rows.mean.to(dtype))
