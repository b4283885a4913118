"""Fake quantization: rounding to the nearest level, in floating point."""

import torch
from torch import Tensor

from lightning_qinit.functional.levels import check_levels, is_run, thresholds

EXTREME = 2.0**100  # of steps: float32 keeps a few octaves free on both sides, so that x / step and bounds stay finite


def broadcast_channels(values: Tensor, x: Tensor, channel_axis: int | None) -> Tensor:
    """Shape one value per channel, ``(channels,)`` or ``(1,)``, so that it broadcasts against ``x``, axis by axis."""
    shape = [1] * x.dim()
    if channel_axis is not None:
        shape[channel_axis] = -1
    return values.reshape(shape)


def fake_quantize(x: Tensor, scale: Tensor | float, levels: Tensor, channel_axis: int | None = None) -> Tensor:
    """Round every value to the nearest of the points ``scale * levels``; values beyond them are clipped.

    A value halfway between two levels goes to the even one where the levels are consecutive integers (as
    ``torch.round`` and torch's own fake quantization do), else to the upper one. There is no gradient trick
    here: quantizers that train are in ``lightning_qinit.quantizers``.

    Args:
        x: any real floating-point tensor; the result has its shape and dtype.
        scale: the step, positive: a number, or one per channel of shape ``(channels,)``.
        levels: the level values at step 1, 1-D and strictly increasing.
        channel_axis: the axis of ``x`` along which ``scale`` runs; ``None`` for one step.

    Raises:
        ValueError: if ``x`` is not floating-point, ``scale`` not positive, or ``levels`` no level set.

    Example:
        >>> from lightning_qinit.functional import fake_quantize, uniform_levels
        >>> fake_quantize(torch.tensor([-9.0, 0.2, 0.3, 2.6]), 0.5, uniform_levels(bits=3, signed=True))
        tensor([-2.0000,  0.0000,  0.5000,  1.5000])
    """
    levels = check_levels(levels).to(x.device)
    scale = broadcast_channels(torch.as_tensor(scale, dtype=torch.float64, device=x.device), x, channel_axis)
    if not x.is_floating_point():
        raise ValueError(f"`x` must be floating-point, got {x.dtype}.")
    if not (scale > 0).all():
        raise ValueError(f"`scale` must be positive, got {float(scale.min())}.")
    v = x.to(torch.float64) / scale
    if is_run(levels):
        code = v.round().clamp(levels[0], levels[-1])
    else:
        code = torch.where(v == v, levels[torch.bucketize(v, thresholds(levels), right=True)], v)
    return (code * scale).to(x.dtype)
