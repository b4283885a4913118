"""The range of the data, or of most of it."""

import torch
from torch import Tensor

from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers.initial import Initial

SHARE = 0.999


def minmax(sample: Sample, levels: Tensor) -> Tensor:
    """The least step that clips nothing: ``max(max(x) / Qp, min(x) / -Qn)`` over the sides that have levels."""
    return _reach(sample.minimum, sample.maximum, levels)


def minmax_affine(sample: Sample, levels: Tensor) -> Initial:
    """The step and offset whose outer points are the least and the greatest value."""
    return _between(sample.minimum, sample.maximum, levels)


def percentile(sample: Sample, levels: Tensor) -> Tensor:
    """As ``minmax``, for the 99.9th percentile of the magnitude (all toolkits have it; none says which percentile).

    No percentile suits all bit widths: the more bits, the further out the best clip lies.
    """
    clip = sample.quantile(SHARE, magnitude=True)
    return _reach(torch.maximum(sample.minimum, -clip), torch.minimum(sample.maximum, clip), levels)


def percentile_affine(sample: Sample, levels: Tensor) -> Initial:
    """The step and offset whose outer points are the 0.1th and the 99.9th percentile."""
    return _between(sample.quantile(1 - SHARE), sample.quantile(SHARE), levels)


def _reach(low: Tensor, high: Tensor, levels: Tensor) -> Tensor:
    scale = torch.zeros_like(high)
    if levels[-1] > 0:
        scale = torch.maximum(scale, high / levels[-1].to(scale))
    if levels[0] < 0:
        scale = torch.maximum(scale, low / levels[0].to(scale))
    return scale


def _between(low: Tensor, high: Tensor, levels: Tensor) -> Initial:
    step = (high - low) / (levels[-1] - levels[0]).to(high)
    return Initial(step, low - step * levels[0].to(high))
