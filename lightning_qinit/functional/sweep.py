"""The error of a quantizer as a function of its step, followed from the largest step to the smallest.

A quantizer with step ``s`` maps ``x`` to the nearest ``s * c``, ``c`` in the level set. As ``s`` falls, a point
moves on to the next level exactly at the breakpoint ``s = x / t``, ``t`` the threshold between both levels.
Between breakpoints the assignment of points to levels is fixed and the squared error is

    f(s) = S - 2 s A + s^2 B,    S = sum w x^2,  A = sum w x c,  B = sum w c^2.

If the values are weights of a layer, the error of its outputs can be followed in the same way: ``w`` the variance and
``m`` the mean of the input that each meets, every output ``o`` adds the square of its sum, ``(X_o - s C_o)^2`` with
``X_o = sum m x`` and ``C_o = sum m c`` over the values that feed it. So ``S`` grows by ``sum X_o^2``, ``A`` by
``sum X_o C_o`` and ``B`` by ``sum C_o^2``, and each piece is still a parabola. But ``f`` jumps at breakpoints now:
both levels of a tie have the same squared error, and errors of opposite sign.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qinit.functional.levels import is_run, thresholds
from lightning_qinit.functional.nearest import index_of
from lightning_qinit.functional.rows import Rows, alike, at_once, squared_error, weighted

# Breakpoints sorted at a time: enough to keep vector units busy, few enough to stay in the cache.
MAX_BREAKPOINTS = 2**17
TIE = 1 - 1e-14  # scores closer than this are equal but for rounding, and the larger step is taken
INSIDE = 2.0**-22  # how far from a jump a step is kept, relative: in float32 it stays on the same side


class Bracket(NamedTuple):
    """An interval of steps for every row, ``(rows,)`` each."""

    lower: Tensor
    upper: Tensor


class Counted(NamedTuple):
    """The breakpoints of every point inside a bracket; ``(rows, n)``, whole numbers of any type.

    Attributes:
        start: index of the level at the upper end.
        moves: by how many levels it has moved at the lower end.
    """

    start: Tensor
    moves: Tensor


class Pieces(NamedTuple):
    """The pieces of ``f`` inside a bracket, from the largest step down; each tensor is ``(rows, pieces)``."""

    lower: Tensor
    upper: Tensor
    a: Tensor
    b: Tensor

    def minima(self, energy: Tensor, inside: float = 0.0) -> tuple[Tensor, Tensor]:
        """Where each piece is least, and its error there.

        Args:
            energy: ``S``, ``(rows,)``.
            inside: how far from the ends of the piece to stay, relative to the step; in the middle of one too short.
        """
        lower, upper = self.lower, self.upper
        if inside:
            middle = (lower + upper) / 2
            lower, upper = torch.minimum(lower * (1 + inside), middle), torch.maximum(upper * (1 - inside), middle)
        step = torch.where(self.b > 0, self.a / self.b, lower).clamp(lower, upper)
        return step, (energy[:, None] - 2 * step * self.a + step.square() * self.b).clamp(min=0)


def outer_bracket(x: Tensor, levels: Tensor) -> Bracket:
    """Steps below and above every breakpoint of a row."""
    t = thresholds(levels).abs()
    t = t[t > 0]
    if not len(t):  # the levels {-c, +c}: no point ever moves
        return Bracket(torch.ones_like(x[:, 0]), torch.full_like(x[:, 0], 2.0))
    size = x.abs()
    largest = size.amax(1)
    smallest = size.masked_fill_(size == 0, torch.inf).amin(1)
    zero = largest == 0
    return Bracket(smallest.masked_fill_(zero, 1.0) / t.max() / 2, largest.masked_fill_(zero, 1.0) / t.min() * 2)


def count_breakpoints(rows: Rows, levels: Tensor, bracket: Bracket) -> Counted:
    """The level of each point at the upper end, and its breakpoints inside the bracket."""
    start = index_of(rows.x, bracket.upper[:, None], levels)
    moves = index_of(rows.x, bracket.lower[:, None], levels).sub_(start)
    return Counted(start, moves if alike(rows.w) else torch.where(rows.w > 0, moves, 0))


def total_breakpoints(rows: Rows, levels: Tensor, bracket: Bracket) -> Tensor:
    """The number of breakpoints of each row inside the bracket."""
    total = torch.zeros(len(rows.x), dtype=torch.int64, device=rows.x.device)
    for part in rows.chunks():
        total += count_breakpoints(part, levels, bracket).moves.abs_().sum(1).to(total)
    return total


def sweep(rows: Rows, levels: Tensor, bracket: Bracket, counted: Counted | None = None) -> Pieces:
    """Follow ``f`` down the bracket: one sort and two cumulative sums."""
    start, moves = counted or count_breakpoints(rows, levels, bracket)
    moved = moves.flatten().nonzero()[:, 0]
    counts = moves.flatten()[moved].abs().to(torch.int64)
    which = torch.repeat_interleave(counts)  # of those that moved, the one that each breakpoint belongs to
    nth = torch.arange(len(which), device=which.device) - (counts.cumsum(0) - counts)[which]
    point = moved[which]
    row = point // rows.x.shape[1]
    total = torch.bincount(row, minlength=len(rows.x))
    width = int(total.max())
    upwards = moves.flatten()[point] > 0
    sign = torch.where(upwards, 1, -1)
    below = start.flatten()[point].to(torch.int64) + nth * sign - torch.where(upwards, 0, 1)  # the lower of two levels
    x = rows.x.flatten()[point]
    at = x / thresholds(levels)[below]
    move, square = levels.diff()[below] * sign, levels.square().diff()[below] * sign
    level = start + levels[0] if is_run(levels) else levels[start.to(torch.int64)]
    if rows.mean is None:
        initial = rows.products(level)
        delta = torch.stack((x * move, square)) * _at(rows.w, point)
    else:
        gain = _gain(rows)
        initial = torch.stack(((gain * level).sum(1), weighted(level.square(), rows.w)))
        parts = [gain.flatten()[point] * move, _at(rows.w, point) * square, _at(rows.mean, point) * move]
        if rows.output is not None:
            parts.append(rows.output.flatten()[point].to(at))
        delta = torch.stack(parts)

    if len(rows.x) > 1:  # one line per row; shorter ones are padded at the end
        place = row * width + torch.arange(len(point), device=point.device) - (total.cumsum(0) - total)[row]
        at = at.new_full((len(total) * width,), -torch.inf).index_copy_(0, place, at)
        delta = delta.new_zeros((len(delta), len(total) * width)).index_copy_(1, place, delta)
    at, order = at.view(len(total), width).sort(dim=1, descending=True)
    at = at.clamp(bracket.lower[:, None], bracket.upper[:, None])

    delta = delta.view(len(delta), len(total), width).gather(2, order.expand(len(delta), -1, -1))
    a, b = torch.cat((initial[:, :, None], delta[:2]), dim=2).cumsum(2)
    if rows.mean is not None:
        b += _squared_sums(rows.sums(level), delta[2], delta[3].long() if len(delta) > 3 else None)
    return Pieces(
        lower=torch.cat((at, bracket.lower[:, None]), dim=1),
        upper=torch.cat((bracket.upper[:, None], at), dim=1),
        a=a,
        b=b,
    )


def _at(part: Tensor, point: Tensor) -> Tensor:
    """The numbers at flat indices; or the one, if all are alike."""
    return part[0, 0] if alike(part) else part.flatten()[point]


def _gain(rows: Rows) -> Tensor:
    """What ``A`` grows by as the level of a value grows by one."""
    assert rows.mean is not None
    total = rows.sums(rows.x)
    return rows.w * rows.x + rows.mean * (total if rows.output is None else total.gather(1, rows.output))


def _squared_sums(start: Tensor, moves: Tensor, output: Tensor | None) -> Tensor:
    """``sum C_o^2`` of every piece, ``(rows, pieces)``.

    Args:
        start: ``C_o`` in the first piece, ``(rows, outputs)``.
        moves: by how much it grows at each breakpoint, ``(rows, breakpoints)``.
        output: which, if there are several.
    """
    if output is None:
        return torch.cat((start, moves), dim=1).cumsum_(1).square_()
    # in order of outputs, and of steps within each
    output, order = output.sort(dim=1, stable=True)
    moves = moves.gather(1, order)
    before = moves.cumsum(1) - moves
    first = torch.searchsorted(output, output)
    before = before - before.gather(1, first) + start.gather(1, output)
    growth = torch.empty_like(moves).scatter_(1, order, (2 * before + moves) * moves)
    return torch.cat((start.square().sum(1, keepdim=True), growth), dim=1).cumsum_(1)


def condense(row: Rows, levels: Tensor, bracket: Bracket) -> Rows:
    """One row with the same ``A`` and ``B`` inside the bracket, and far fewer points.

    Points without a breakpoint in the bracket keep their level, so all of one level act as their sum at their
    mean. Equal values act as one. (``S`` changes by a constant.)
    """
    total = torch.zeros((2, len(levels)), dtype=torch.float64, device=levels.device)
    moving = []
    for part in row.chunks():
        start, moves = count_breakpoints(part, levels, bracket)
        x, w, level, still = part.x[0], part.w[0], start[0].to(torch.int64), moves[0] == 0
        weight = torch.where(still, w, 0.0)
        total[0] += torch.bincount(level, weight, len(levels))
        total[1] += torch.bincount(level, weight * x, len(levels))
        values, index = x[~still].unique(return_inverse=True)
        moving.append((values, torch.bincount(index, w[~still], len(values))))
    values, index = torch.cat([x for x, _ in moving]).unique(return_inverse=True)
    mass = torch.bincount(index, torch.cat([w for _, w in moving]), len(values))
    used = total[0] > 0
    still_x, still_w = total[1][used] / total[0][used], total[0][used]
    return Rows(torch.cat((still_x, values))[None], torch.cat((still_w, mass))[None])


def in_parts(
    solve: Callable[[Rows, Bracket, Counted | None, slice], tuple[Tensor, ...]],
    rows: Rows,
    levels: Tensor,
    bracket: Bracket,
) -> tuple[Tensor, ...]:
    """Call ``solve`` on groups of rows with about ``MAX_BREAKPOINTS`` breakpoints each, and join its results."""
    if len(rows.x) == 1:  # which may be too long to count all at once
        return solve(rows, bracket, None, slice(None))
    start, moves = count_breakpoints(rows, levels, bracket)
    most = max(1, int(torch.linalg.vector_norm(moves.double(), 1, dim=1).max()))
    group = max(1, at_once(MAX_BREAKPOINTS, rows.x) // most)
    parts = []
    for first in range(0, len(rows.x), group):
        index = slice(first, first + group)
        part = Bracket(bracket.lower[index], bracket.upper[index])
        parts.append(solve(rows.take(index), part, Counted(start[index], moves[index]), index))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def best_in(rows: Rows, levels: Tensor, bracket: Bracket) -> tuple[Tensor, ...]:
    """The best assignment met inside a bracket: its step ``A / B`` and ``A^2 / B`` of every row.

    ``S - A^2/B`` is the least error of that assignment; the first of equals wins, which is the larger step.
    """
    return in_parts(lambda rows, bracket, counted, _: _best(rows, levels, bracket, counted), rows, levels, bracket)


def _best(rows: Rows, levels: Tensor, bracket: Bracket, counted: Counted | None) -> tuple[Tensor, Tensor]:
    if len(rows.x) == 1:
        rows = condense(rows, levels, bracket)
        counted = count_breakpoints(rows, levels, bracket)
        if int(counted.moves.abs().sum()) > 4 * MAX_BREAKPOINTS:  # halve the bracket, so that memory is bounded
            if halves := _halves(bracket):
                high, low = (_best(rows, levels, half, None) for half in halves)
                return low if bool(low[1] * TIE > high[1]) else high
    pieces = sweep(rows, levels, bracket, counted)
    score = torch.where((pieces.a > 0) & (pieces.b > 0), pieces.a.square() / pieces.b, 0.0)
    index = (score >= score.amax(1, keepdim=True) * TIE).int().argmax(1, keepdim=True)
    return (pieces.a.gather(1, index) / pieces.b.gather(1, index))[:, 0], score.gather(1, index)[:, 0]


def _halves(bracket: Bracket) -> tuple[Bracket, Bracket] | None:
    """The upper and the lower half of one row's bracket; ``None`` where no number lies between its ends."""
    lower, upper = bracket
    middle = (lower * upper).sqrt()
    if not bool((lower < middle) & (middle < upper)):
        return None
    return Bracket(middle, upper), Bracket(lower, middle)


def least_in(rows: Rows, levels: Tensor, bracket: Bracket) -> tuple[Tensor, ...]:
    """The step of least error inside a bracket, for errors that jump at breakpoints, and its error in float32.

    The least error of a piece may be at its end, where the next begins and is not as low, so steps within ``INSIDE`` of
    an end do not count. Of pieces too short for that the middle does, if no other step is as good once it is rounded to
    float32, which may carry it into another piece: among millions of values that changes little, where many share a
    breakpoint but for rounding (weights on a grid) it changes all. Of equals the larger step is taken.
    """
    return in_parts(lambda rows, bracket, counted, _: _least(rows, levels, bracket, counted), rows, levels, bracket)


def _least(rows: Rows, levels: Tensor, bracket: Bracket, counted: Counted | None) -> tuple[Tensor, Tensor]:
    if len(rows.x) == 1 and int(total_breakpoints(rows, levels, bracket)) > 4 * MAX_BREAKPOINTS:
        if halves := _halves(bracket):  # as in `_best`
            high, low = (_least(rows, levels, half, None) for half in halves)
            return low if bool(low[1] < high[1] * TIE) else high
    pieces = sweep(rows, levels, bracket, counted)
    step, error = pieces.minima(rows.energy(), INSIDE)
    length = pieces.upper - pieces.lower
    best, least = bracket.upper, torch.full_like(bracket.upper, torch.inf)
    for shortest in (2 * INSIDE, 1 - TIE):
        possible = torch.where(length > shortest * pieces.upper, error, torch.inf)
        index = (possible * TIE <= possible.amin(1, keepdim=True)).int().argmax(1, keepdim=True)
        trial = step.gather(1, index)[:, 0]
        mantissa, exponent = torch.frexp(trial)
        reached = squared_error(rows, levels, torch.ldexp(mantissa.float().double(), exponent))
        better = reached < least * TIE
        best, least = torch.where(better, trial, best), torch.where(better, reached, least)
    return best, least
