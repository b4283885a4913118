"""Which level each value is rounded to."""

import torch
from torch import Tensor

from lightning_qinit.functional.fake_quantize import broadcast_channels
from lightning_qinit.functional.levels import thresholds
from lightning_qinit.quantizers import Quantizer


def normalized(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Values in units of the step, from the offset, as the quantizer computes them."""
    if quantizer.offset is not None:
        x = x - broadcast_channels(quantizer.offset.detach(), x, quantizer.channel_axis)
    return x * broadcast_channels(quantizer.step.detach(), x, quantizer.channel_axis).reciprocal()


def codes_of(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Index of the level that each value is rounded to, int64."""
    return torch.bucketize(normalized(quantizer, x).contiguous(), thresholds(quantizer.levels.to(x)), right=True)
