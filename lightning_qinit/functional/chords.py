"""A bracket for rows of few values, from a grid of steps.

The error is a minimum of parabolas in the step, ``S - 2 s A + s^2 B`` one for each assignment of points to levels (see
:mod:`~lightning_qinit.functional.sweep`), and ``B = sum w c^2`` only grows as ``s`` falls. So on an interval
``[lo, hi]`` of steps ``f(s) - B(lo) s^2`` is a minimum of concave functions: it lies above its chord. The least value of
that chord and the parabola, with ``d = |f(hi) - f(lo)|`` and ``C = B(lo) (hi - lo)^2``, gives

    f(s) >= min(f(lo), f(hi)) - max(C - d, 0)^2 / (4 C).

By the triangle inequality ``sqrt(B) s <= sqrt(S) + sqrt(f(s))``, so that errors are all that has to be computed.

Beyond the grid, steps are excluded by what is clipped and by the dead zone, as in
:mod:`~lightning_qinit.functional.bracket`.
"""

import torch
from torch import Tensor

from lightning_qinit.functional.bracket import SLACK, reach
from lightning_qinit.functional.levels import is_run
from lightning_qinit.functional.sweep import Bracket, Rows, alike, at_once, nearest_level, squared_error

FIRST = (2.0, 1.0, 0.5, 0.25, 0.125)  # where the first grid may begin, in its units of the inverse step
MOST = 512  # where it ends
GAP = 0.25  # by how much its bound may lie below the error at a usual step, relative
EVERY = 4  # steps between two looks at what is clipped
FINER = (10, 10, 8)  # intervals of the grids that follow, each inside the hull before it
GLANCE = 128  # values of a row that a usual step is guessed from
CHUNK = 2**17  # values at a time
COARSE = 32  # levels up to which errors are so large that float32 tells them apart
# Of errors: relative, by sums of up to 2^14 squares; and relative to the energy, by the rounding of the values.
ROUNDING = {torch.float32: (2.0**-11, 2.0**-33), torch.float64: (SLACK, SLACK)}


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
    usual = _usual(rows, levels, bracket.upper)
    errors.add([1 / usual])
    limit, share = errors.reached(), (errors.square[0] / errors.energy).nan_to_num(1.0)
    unit = 2 * (GAP * share).clamp(2.0**-18, 1.0).sqrt() / usual

    dead = []
    for k in FIRST:
        dead.append(errors.dead(k * unit))
        if bool((dead[-1] > limit).all()):
            break
    errors.forget()
    errors.add([k * unit for k in FIRST[: len(dead)][::-1]])
    for k in range(3, MOST, EVERY):
        errors.add([(k + i) * unit for i in range(EVERY)])
        clipped = errors.clipped()
        if bool((clipped > errors.error.amin(0)).all()) and bool((clipped > errors.reached()).all()):
            break
    limit = torch.minimum(limit, errors.reached())
    end = torch.where(torch.stack(dead[::-1]) > limit, errors.step[: len(dead)], torch.inf).amin(0)
    hull = errors.hull(limit, end)
    bracket = Bracket(
        torch.maximum(bracket.lower, torch.where(errors.clipped() > limit, hull.lower, 0.0)),
        torch.minimum(bracket.upper, torch.where(end.isfinite(), hull.upper, torch.inf)),
    )
    for intervals in FINER:
        errors.forget()
        first, last = 1 / bracket.upper, 1 / bracket.lower
        errors.add([first + (last - first) * (k / intervals) for k in range(intervals + 1)])
        limit = torch.minimum(limit, errors.reached())
        hull = errors.hull(limit, bracket.upper)
        bracket = Bracket(torch.maximum(bracket.lower, hull.lower), torch.minimum(bracket.upper, hull.upper))
    return bracket


class _Errors:
    """Errors at a grid of falling steps; ``(steps, rows)``, one grid after another."""

    def __init__(self, rows: Rows, levels: Tensor) -> None:
        self.rows = rows
        self.levels, self.run = levels.to(rows.x.dtype), is_run(levels)
        self.outer = float(levels[0]), float(levels[-1])
        self.root = None if alike(rows.w) else rows.w.sqrt()
        self.level, self.rest = torch.empty_like(rows.x), torch.empty_like(rows.x)
        self.energy = self._squares([self._norm(rows.x.clone())])[0]
        self.forget()

    def forget(self) -> None:
        """Begin another grid."""
        self.step = self.square = self.error = self.energy.new_empty((0, len(self.energy)))

    def add(self, inverses: list[Tensor]) -> None:
        """The errors at the steps ``1 / inverses``."""
        x, rest = self.rows.x, self.rest
        inverse = torch.stack(inverses).to(x.dtype)[:, :, None]
        step = inverse.reciprocal()
        norms, biases = [], []
        for i in range(len(step)):
            torch.addcmul(x, self._round(inverse[i]), step[i], value=-1, out=rest)
            if self.rows.mean is not None:
                biases.append(self.rows.sums(rest).double().square().sum(1))
            norms.append(self._norm(rest))
        square = self._squares(norms)
        self.step = torch.cat((self.step, step[:, :, 0].double()))
        self.square = torch.cat((self.square, square))
        self.error = torch.cat((self.error, square + torch.stack(biases) if biases else square))

    def _round(self, inverse: Tensor) -> Tensor:
        """The level of every value, until the next call."""
        torch.mul(self.rows.x, inverse, out=self.level)
        if self.run:
            return self.level.round_().clamp_(*self.outer)
        return self.level.copy_(nearest_level(self.level, self.levels))

    def _norm(self, values: Tensor) -> Tensor:
        """The root of the sum of squares, with their weights if these differ. The values are lost."""
        return torch.linalg.vector_norm(values if self.root is None else values.mul_(self.root), dim=1)

    def _squares(self, norms: list[Tensor]) -> Tensor:
        squares = torch.stack(norms).double().square_()
        return squares if self.root is not None else squares.mul_(self.rows.w[0, 0])

    def reached(self) -> Tensor:
        """An error that a step of the grid has, or one of outputs that it has but for levels that are equally near."""
        error, index = self.error.min(0, keepdim=True)
        if self.rows.mean is not None:
            best = self.step.gather(0, index)[0]
            error = squared_error(self.rows, self.levels, best.to(self.rows.x.dtype)).double()[None]
        relative, small = ROUNDING[self.rows.x.dtype]
        return error[0] * (1 + relative) + small * self.energy

    def dead(self, inverse: Tensor) -> Tensor:
        """The error of the points nearest to level 0, which only falls as the step does."""
        level = self._round(inverse[:, None].to(self.rows.x.dtype))
        return self._squares([self._norm(torch.where(level == 0, self.rows.x, 0.0))])[0]

    def clipped(self) -> Tensor:
        """At the last step, the error of the points beyond the outer levels, which only grows as the step falls."""
        x, step = self.rows.x, self.step[-1][:, None].to(self.rows.x.dtype)
        over = (x - step * self.outer[1]).clamp_(min=0).maximum(step * self.outer[0] - x)
        return self._squares([self._norm(over)])[0]

    def hull(self, limit: Tensor, end: Tensor) -> Bracket:
        """Of the intervals below ``end`` whose bound is not above the limit."""
        step, high, low = self.step, self.square[:-1], self.square[1:]
        c = (self.energy.sqrt() + low.sqrt()).square() * (step[:-1] / step[1:] - 1).square()
        dip = (c - (high - low).abs()).clamp(min=0).square() / (4 * c).clamp(min=torch.finfo(c.dtype).tiny)
        possible = (torch.minimum(high, low) - dip <= limit) & (step[1:] < end)
        return Bracket(
            torch.where(possible, step[1:], torch.inf).amin(0), torch.where(possible, step[:-1], 0.0).amax(0)
        )


def _usual(rows: Rows, levels: Tensor, other: Tensor) -> Tensor:
    """A step that is about the best of those that clip little; ``other`` where no level can be of use."""
    every = -(-rows.x.shape[1] // GLANCE)
    rows, levels = Rows(rows.x[:, ::every].contiguous(), rows.w[:, ::every]), levels.to(rows.x.dtype)
    widest = reach(rows.x, levels)
    steps = torch.where(widest > 0, widest, other.to(widest)) * 2.0 ** -torch.arange(4.0)[:, None].to(widest)
    errors = torch.stack([squared_error(rows, levels, step) for step in steps])
    return steps.double().gather(0, errors.argmin(0, keepdim=True))[0]


def _as(dtype: torch.dtype, rows: Rows) -> Rows:
    w = rows.w[:1, :1].to(dtype).expand_as(rows.w) if alike(rows.w) else rows.w.to(dtype)
    return rows._replace(x=rows.x.to(dtype), w=w, mean=None if rows.mean is None else rows.mean.to(dtype))
