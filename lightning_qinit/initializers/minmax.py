"""The range of the data."""

import torch
from torch import Tensor

from lightning_qinit.functional.sample import Sample


def minmax(sample: Sample, levels: Tensor) -> Tensor:
    """The least step that clips nothing: ``max(max(x) / Qp, min(x) / -Qn)`` over the sides that have levels."""
    scale = torch.zeros_like(sample.maximum)
    if levels[-1] > 0:
        scale = torch.maximum(scale, sample.maximum / levels[-1].to(scale))
    if levels[0] < 0:
        scale = torch.maximum(scale, sample.minimum / levels[0].to(scale))
    return scale
