"""The step of least squared quantization error, exactly, for any level set."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qinit.functional.bracket import coarse, fine, gather, nodes_per_row
from lightning_qinit.functional.chords import scan
from lightning_qinit.functional.determinism import any_order
from lightning_qinit.functional.levels import check_levels
from lightning_qinit.functional.nearest import nearest
from lightning_qinit.functional.rows import Rows, alike, at_once, squared_error
from lightning_qinit.functional.sweep import TIE, Bracket, best_in, least_in, outer_bracket, total_breakpoints

RESOLUTIONS = (4, 6, 9, 12)  # mantissa bits of the nodes, each bracket narrower than the one before
SHORT = 2**14  # values of a row up to which a grid of steps costs less than cells
MANY = 2**17  # breakpoints from which that is cheaper than to sort them, since it is hundreds of small operations
BEYOND = 2.0**40  # errors of outputs may be least beyond all breakpoints, those of values only next to them
ROW_ELEMENTS = 2**18  # rows are taken in groups of about this many values: memory is bounded, caches are used


class OptimalScale(NamedTuple):
    """The result of :func:`optimal_scale`.

    Attributes:
        scale: float64, 0-d per tensor or ``(channels,)`` per channel: the step of least error.
        error: float64, same shape: the weighted sum of squared errors at ``scale``.
        levels: the level set used, 1-D float64.
        lower: float64, same shape: the optimum was proven to lie in ``[lower, upper]`` before it was solved.
        upper: float64, same shape.
    """

    scale: Tensor
    error: Tensor
    levels: Tensor
    lower: Tensor
    upper: Tensor


@torch.no_grad()
def optimal_scale(
    x: Tensor, levels: Tensor, channel_axis: int | None = None, weights: Tensor | None = None
) -> OptimalScale:
    """The global optimum of ``f(s) = sum_i w_i (x_i - s c_i(s))^2``, with ``s c_i(s)`` the point nearest to ``x_i``.

    As ``s`` falls from infinity, each point moves from level to level at known breakpoints; between them the
    assignment is fixed and ``f`` is a parabola whose minimum is ``S - A^2/B`` at ``A/B``, ``A = sum w x c``,
    ``B = sum w c^2``. The least of these over all assignments that the sweep meets is the global minimum of
    ``f``: reading off the nearest assignment at ``A/B`` can only lower the error, and the best assignment is
    among those met. One sort of the breakpoints and two cumulative sums find it.

    Where there are many breakpoints (points times levels), the optimum is first enclosed in a bracket, on cells
    of similar points or, of few points, on a grid of steps, and then solved inside it. The bracket is proven to hold
    the optimum (the bounds are in ``lightning_qinit.functional.bracket`` and ``.chords``), so the answer is exact
    for tensors of any size.

    Args:
        x: any real tensor; computed in float64.
        levels: the level values at step 1, 1-D and strictly increasing. Usually holds 0; a set without 0 (binary,
            mid-rise) starts the sweep from the level nearest to 0 on each side.
        channel_axis: one step per index of this axis, or ``None`` for one step in all.
        weights: importance of each value, nonnegative and broadcastable to ``x``; ``None`` weighs all alike.

    Returns:
        An :class:`OptimalScale`. Of equal optima the larger step is taken. Where there is no best step (all
        values zero, or no level on their side of zero) the scale is 1.

    Raises:
        ValueError: if ``x`` or ``weights`` hold NaN or infinite values, ``weights`` negative ones, or ``levels``
            is not a level set, or ``channel_axis`` no axis.

    Example:
        >>> from lightning_qinit.functional import optimal_scale
        >>> fit = optimal_scale(torch.tensor([-1.0, 1.0, 2.0, 4.0]), torch.tensor([-1.0, 0.0, 1.0]))
        >>> fit.scale
        tensor(3., dtype=torch.float64)
        >>> fit.error
        tensor(4., dtype=torch.float64)
    """
    levels = check_levels(levels).to(x.device)
    rows = to_rows(x, channel_axis)
    if rows.numel() and not torch.stack(rows.aminmax()).isfinite().all():  # NaN is passed on
        raise ValueError(f"`x` must be finite, got {int((~rows.isfinite()).sum())} NaN or infinite values.")
    if weights is None:
        w = torch.ones((), dtype=torch.float64, device=x.device).expand_as(rows)
    else:
        w = to_rows(weights.to(x.device).expand_as(x), channel_axis)
        if not (w >= 0).all() or not w.isfinite().all():
            raise ValueError("`weights` must be finite and nonnegative.")
    fit = solve_rows(Rows(rows, w), levels)
    return fit if channel_axis is not None else OptimalScale(*(v if v is levels else v[0] for v in fit))


@any_order()
def solve_rows(rows: Rows, levels: Tensor) -> OptimalScale:
    """:func:`optimal_scale` on checked float64 rows; the result is ``(rows,)``."""
    group = max(1, at_once(ROW_ELEMENTS, rows.x) // max(1, rows.x.shape[1]))
    starts = range(0, max(1, len(rows.x)), group)
    parts = [_solve(rows.take(slice(first, first + group)), levels) for first in starts]
    scale, error, lower, upper = (torch.cat(part) for part in zip(*parts, strict=True))
    return OptimalScale(scale, error, levels, lower, upper)


def to_rows(x: Tensor, channel_axis: int | None) -> Tensor:
    """``x`` in float64 as ``(channels, values)``, or ``(1, values)`` without a channel axis."""
    x = x.detach().to(torch.float64)
    if channel_axis is None:
        return x.reshape(1, -1)
    if not -x.dim() <= channel_axis < x.dim():
        raise ValueError(f"`channel_axis` must be one of the {x.dim()} axes of `x`, got {channel_axis!r}.")
    channels = x.shape[channel_axis]
    return x.movedim(channel_axis, 0).reshape(channels, x.numel() // max(1, channels)).contiguous()


def _solve(rows: Rows, levels: Tensor) -> tuple[Tensor, ...]:
    """Solve rows of values; returns scale, error, and the bracket, each ``(rows,)``."""
    x = rows.x if alike(rows.w) else torch.where(rows.w > 0, rows.x, 0.0)
    if x.numel() == 0:
        one = x.new_ones(len(x))
        return one, 0 * one, 0 * one, one / 0
    low, high = x.amin(1), x.amax(1)
    exponent = torch.frexp(torch.maximum(-low, high)).exponent.clamp(min=-1000)  # its inverse must be a number
    unit = rows._replace(x=x * torch.ldexp(x.new_ones(len(x)), -exponent)[:, None])  # exact, and keeps squares in range
    if rows.mean is None and not alike(rows.w):  # and so do weights
        most = torch.frexp(rows.w.amax(1)).exponent.clamp(min=-1000)
        unit = unit._replace(w=rows.w * torch.ldexp(x.new_ones(len(x)), -most)[:, None])
    bracket = outer_bracket(unit.x, levels)
    if unit.mean is not None:
        bracket = Bracket(bracket.lower / BEYOND, bracket.upper * BEYOND)
    row = torch.arange(len(x), device=x.device)  # the one that each bracket belongs to
    short = x.shape[1] <= SHORT
    if short and x.numel() * (len(levels) - 1) > MANY:
        row, bracket = scan(unit, levels, bracket)
    for mantissa_bits in () if short else RESOLUTIONS:
        if total_breakpoints(unit, levels, bracket).sum() < x.numel() // 2 + len(x) * nodes_per_row(mantissa_bits):
            break  # solving is cheaper than narrowing
        nodes = gather(unit, mantissa_bits)
        if mantissa_bits == RESOLUTIONS[0]:
            bracket = coarse(nodes, unit, levels, bracket)
        bracket = fine(nodes, unit, levels, bracket)
    scale, found = _in_brackets(unit, levels, row, bracket)
    scale = torch.ldexp(torch.where(found, scale, 1.0), torch.where(found, exponent, 0))
    lower = torch.full_like(scale, torch.inf).scatter_reduce_(0, row, bracket.lower, "amin")
    upper = torch.zeros_like(scale).scatter_reduce_(0, row, bracket.upper, "amax")
    # levels on one side of zero, or without it, may be best at a step beyond all breakpoints
    lower = torch.minimum(torch.ldexp(lower, exponent), scale)
    upper = torch.maximum(torch.ldexp(upper, exponent), scale)
    return scale, squared_error(rows, levels, scale), lower, upper


def _in_brackets(rows: Rows, levels: Tensor, row: Tensor, bracket: Bracket) -> tuple[Tensor, Tensor]:
    """The best step of every row in any of its brackets, and whether there is one."""
    several = rows if len(row) == len(rows.x) else rows.take(row)
    if rows.mean is not None:
        scale, error = least_in(several, levels, bracket)
        low, high = rows.x.amin(1), rows.x.amax(1)
        return _first(scale, -error, row, len(rows.x))[0], (low * levels[0] > 0) | (high * levels[-1] > 0)
    scale, score = best_in(several, levels, bracket)
    scale, score = _first(scale, score, row, len(rows.x))
    return _polish(rows, levels, torch.where(score > 0, scale, 1.0)), score > 0


def _first(scale: Tensor, score: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Of the results of every row that with the greatest score, of equals the first."""
    if len(row) == rows:
        return scale, score
    best = torch.full((rows,), -torch.inf).to(score).scatter_reduce_(0, row, score, "amax")
    place = torch.where(score >= best[row] - (1 - TIE) * best[row].abs(), torch.arange(len(row)).to(row), len(row))
    first = torch.full((rows,), len(row)).to(row).scatter_reduce_(0, row, place, "amin")
    return scale[first], score[first]


def _polish(rows: Rows, levels: Tensor, scale: Tensor) -> Tensor:
    """Recompute ``A/B`` at the nearest assignment: the same optimum without the rounding of long sums."""
    for _ in range(2):
        parts = [part.products(nearest(part.x, scale[:, None], levels)) for part in rows.chunks()]
        a, b = torch.stack(parts).sum(0)
        before, scale = scale, torch.where((a > 0) & (b > 0), a / torch.where(b > 0, b, 1.0), scale)
        if bool(((scale - before).abs() <= 1e-14 * scale).all()):
            break
    return scale
