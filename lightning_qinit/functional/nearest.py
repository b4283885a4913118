"""Which level is nearest to a value."""

import torch
from torch import Tensor

from lightning_qinit.functional.levels import is_run, thresholds

FEW = 64  # thresholds up to which comparing with each takes less than a search


def assign(x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to ``x / scale``; ``scale`` is ``(rows, 1)``."""
    index = index_of(x, scale, levels)
    if index.is_floating_point():  # NaN is past every threshold, as in the search
        index = index.nan_to_num_(len(levels) - 1).to(torch.int64)
    return index


def index_of(x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """:func:`assign`, in the type that it is found in."""
    if is_run(levels):
        return nearest(x, scale, levels).sub_(levels[0])
    return _past(x / scale, thresholds(levels))


def _past(v: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds a value is not below."""
    if v.is_cuda or len(thresholds) > FEW:
        return torch.bucketize(v, thresholds, right=True)
    count, below = torch.full_like(v, len(thresholds)), torch.empty_like(v)
    for threshold in thresholds.tolist():
        count -= torch.lt(v, threshold, out=below)
    return count


def nearest(x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The level nearest to ``x / scale``, the upper one of two; ``scale`` is ``(rows, 1)``."""
    if is_run(levels):  # arithmetic instead of a search: several times faster
        return (x / scale).add_(0.5).floor_().clamp_(float(levels[0]), float(levels[-1]))
    return nearest_level(x / scale, levels)


def nearest_level(v: Tensor, levels: Tensor) -> Tensor:
    """The level nearest to each normalized value, of any set of levels."""
    index = _past(v, thresholds(levels)).flatten().to(torch.int32)
    return levels.index_select(0, index).view(v.shape)
