"""The integers behind a quantized weight."""

import torch
from torch import Tensor

from lightning_qinit.functional.fake_quantize import broadcast_channels
from lightning_qinit.functional.levels import thresholds
from lightning_qinit.quantizers import Quantizer


@torch.no_grad()
def weight_codes(quantizer: Quantizer, weight: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Which level each weight is rounded to, with the steps and the levels: ``levels[codes] * scale`` is the weight.

    Args:
        quantizer: that of the weight, active.
        weight: the weight.
        name: of the weight, for the message.

    Returns:
        int64 codes of the weight's shape; the step, ``(channels,)`` or ``(1,)``; the levels. The latter two in the
        dtype that the quantizer computes in.

    Raises:
        ValueError: if the quantizer gives anything but levels times the step.
    """
    quantized, axis = quantizer(weight), quantizer.channel_axis
    scale = quantizer.step.to(torch.promote_types(weight.dtype, torch.float32))
    levels = quantizer.levels.to(scale)
    columns = broadcast_channels(scale, quantized, axis)
    codes = torch.bucketize((quantized / columns).contiguous(), thresholds(levels))
    if not torch.equal((levels[codes] * columns).to(quantized.dtype), quantized):
        kind = type(quantizer).__name__
        raise ValueError(f"`{name}` cannot be exported: what its {kind} gives is no level times the step.")
    return codes, scale, levels
