"""Step and offset of least squared error."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qinit.functional.determinism import any_order
from lightning_qinit.functional.levels import check_levels, thresholds
from lightning_qinit.functional.nearest import assign
from lightning_qinit.functional.optimal import solve_rows
from lightning_qinit.functional.sample import Sample

ALL_ZERO_POINTS = 32  # up to so many levels every zero point is tried, above they are searched from coarse to fine
TURNS = 50
GAIN = 1e-9  # relative: turns that gain less are not worth another


class OptimalAffine(NamedTuple):
    """The result of :func:`optimal_affine`.

    Attributes:
        scale: float64, ``(groups,)``.
        offset: float64, ``(groups,)``.
        error: float64, ``(groups,)``: the weighted sum of squared errors.
    """

    scale: Tensor
    offset: Tensor
    error: Tensor


@torch.no_grad()
def optimal_affine(sample: Sample, levels: Tensor) -> OptimalAffine:
    """Step ``s`` and real offset ``b`` of least squared error to the points ``s c + b``.

    With an integer zero point ``z`` the points are ``s (c - z)``: a level set of its own, on which the step is solved
    exactly, so that the best of all zero points is the exact optimum over step and zero point. (Above 32 levels the
    zero points are searched from coarse to fine.) From there, and from the range of the data, the offset moves freely:
    for fixed codes step and offset are a linear regression, for a fixed offset the step is solved exactly, and each
    turn lowers the error. The answer is never worse than the best step without an offset, signed or not, or than the
    range of the data; it is not proven to be the global optimum over real offsets.

    Args:
        sample: the data, in groups.
        levels: ``0 .. 2^b - 1``.
    """
    levels = check_levels(levels).to(sample.values.device)
    scale, zero_point = _over_zero_points(sample, levels)
    span = (sample.maximum - sample.minimum) / (levels[-1] - levels[0])
    best = _turns(sample, levels, scale, -scale * zero_point)
    other = _turns(sample, levels, torch.where(span > 0, span, scale), sample.minimum)
    better = other.error < best.error
    return OptimalAffine(*(torch.where(better, new, old) for new, old in zip(other, best, strict=True)))


def refine(sample: Sample, levels: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Alternate codes and the regression on them until the error stands still; never worse than the start.

    Args:
        sample: the data.
        levels: a level set.
        scale: where the step starts, ``(groups,)``.
        offset: where the offset starts, ``(groups,)``.
    """
    levels = levels.to(sample.values)
    error = affine_error(sample, levels, scale, offset)
    for _ in range(TURNS):
        new_scale, new_offset = _regression(sample, levels, scale, offset)
        new_error = affine_error(sample, levels, new_scale, new_offset)
        better = new_error < error
        scale, offset = torch.where(better, new_scale, scale), torch.where(better, new_offset, offset)
        if not (new_error < error * (1 - GAIN)).any():
            break
        error = torch.minimum(new_error, error)
    return scale, offset


@any_order()
def refine_scale(sample: Sample, levels: Tensor, scale: Tensor) -> Tensor:
    """As :func:`refine` without an offset: the local minimum of the error that is reached from ``scale``.

    On sorted values and their sums a turn is a search for the thresholds, whatever the number of values.
    """
    x, order = sample.values.sort(dim=1)
    w = sample.weights.gather(1, order)
    sums = F.pad(torch.stack((w, w * x)).cumsum(2), (1, 0))  # of the values below each
    levels = levels.to(x)
    middle = thresholds(levels)

    def moments(scale: Tensor) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` of the error ``S - 2 s A + s^2 B`` (see ``sweep``)."""
        ends = F.pad(torch.searchsorted(x, scale[:, None] * middle), (1, 1))
        ends[:, -1] = x.shape[1]
        weight, total = sums.gather(2, ends.expand(2, -1, -1)).diff(dim=2)
        return total @ levels, weight @ levels.square()

    a, b = moments(scale)
    error = sample.energy - 2 * scale * a + scale.square() * b
    for _ in range(TURNS):
        fitted = torch.where((a > 0) & (b > 0), a / b, scale)
        a, b = moments(fitted)
        new_error = sample.energy - 2 * fitted * a + fitted.square() * b
        gains = (new_error < error * (1 - GAIN)).any()
        scale, error = torch.where(new_error < error, fitted, scale), torch.minimum(new_error, error)
        if not gains:
            break
    return scale


def affine_error(sample: Sample, levels: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Sum of squared errors of each group, ``(groups,)``, to the points ``scale * levels + offset``."""
    return (sample if offset is None else sample.shifted(offset)).error(levels, scale)


def _over_zero_points(sample: Sample, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of least error, each ``(groups,)``."""
    count = len(levels)
    stride = max(1, count // ALL_ZERO_POINTS)
    nothing = torch.full_like(sample.minimum, torch.inf)
    scale, best, error = torch.ones_like(nothing), torch.zeros_like(nothing), nothing
    tried: set[int] = set()
    candidates = [*range(0, count, stride), count // 2]
    while True:
        for zero_point in set(candidates) - tried:
            level = levels[zero_point]
            fit = solve_rows(sample.rows, levels - level)
            better = fit.error < error
            scale, best = torch.where(better, fit.scale, scale), torch.where(better, level, best)
            error = torch.where(better, fit.error, error)
        tried.update(candidates)
        if stride == 1:
            return scale, best
        stride //= 2
        index = torch.bucketize(best, levels)
        candidates = [int(i) for i in torch.cat((index - stride, index + stride)).unique() if 0 <= i < count]


def _turns(sample: Sample, levels: Tensor, scale: Tensor, offset: Tensor) -> OptimalAffine:
    error = affine_error(sample, levels, scale, offset)
    for _ in range(TURNS):
        before = error
        scale, offset = refine(sample, levels, scale, offset)
        moved = sample.shifted(offset)
        fit = solve_rows(moved.rows, levels)
        error = moved.error(levels, scale)
        scale = torch.where(fit.error < error, fit.scale, scale)
        error = torch.minimum(error, fit.error)
        if not (error < before * (1 - GAIN)).any():
            break
    return OptimalAffine(scale, offset, error)


def _regression(sample: Sample, levels: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of the values on their present levels; a group whose levels do not vary stays as it is."""
    usable = torch.where(scale > 0, scale, 1.0)
    level = levels[assign(sample.values - offset[:, None], usable[:, None], levels)]
    x = sample.values
    mean_level, mean_x = sample.mean(level), sample.mean(x)
    covariance = sample.mean((level - mean_level[:, None]) * (x - mean_x[:, None]))
    variance = sample.mean((level - mean_level[:, None]).square())
    fitted = covariance / torch.where(variance > 0, variance, 1.0)
    good = (variance > 0) & (fitted > 0)
    return torch.where(good, fitted, scale), torch.where(good, mean_x - fitted * mean_level, offset)
