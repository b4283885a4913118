"""The passes of a quantizer as chains of torch operations, which torch can trace, compile and differentiate.

A chain reads and writes the values a dozen times, which is all that fake quantization costs. Where the operations are
not recorded, there are kernels that do it once (see :mod:`~lightning_qinit.quantizers.kernels`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

UNROLLED = 32  # levels up to which comparing with every threshold is faster than searching among them


class Levels(NamedTuple):
    """The levels at step 1.

    Attributes:
        points: all of them, 1-D and sorted; the lowest and the highest if they are uniform.
        low: the lowest. As a number it is a constant of what is compiled: each tensor less that a value depends on
            lets ``torch.compile`` compute the value where it is needed, and not store it.
        high: the highest.
        uniform: whether they are all integers between the two.
    """

    points: Tensor
    low: float
    high: float
    uniform: bool


def forward(x: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels, dtype: torch.dtype) -> Tensor:
    """The point ``scale * level + offset`` nearest to each value.

    Args:
        x: the values.
        scale: the step, broadcasting against ``x``.
        offset: likewise; ``None`` for 0.
        levels: the levels at step 1.
        dtype: of the result.
    """
    v, scale, offset = _normalized(x, scale, offset)
    y = nearest(v, levels) * scale
    return cast(y if offset is None else y + offset, dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    levels: Levels,
    learns_rounding: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients to ``x``, ``scale`` and ``offset``, given that to the result of :func:`forward`."""
    v, scale, offset = _normalized(x, scale, offset)
    wide = cast(grad, v.dtype)
    inside, slope = _slope(v, levels, learns_rounding)
    to_scale = _summed(wide * slope, scale)
    to_offset = None if offset is None else _summed(torch.where(inside, 0.0, wide), offset)
    return cast(torch.where(inside, grad, 0.0), x.dtype), to_scale, to_offset


def tangents(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    levels: Levels,
    learns_rounding: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """How each result of :func:`forward` changes with the scale, and with the offset."""
    v, scale, offset = _normalized(x, scale, offset)
    inside, slope = _slope(v, levels, learns_rounding)
    return cast(slope, dtype), None if offset is None else (~inside).to(dtype)


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """The sum over the axes along which the other tensor has one value."""
    if torch.compiler.is_compiling() and x.dim() > 3 and like.numel() == 1:
        # The compiler's sum over everything walks through memory in the order of the axes, an order of magnitude slower
        # where the channels lie last; over the channels first it reads either layout as it lies.
        x = x.sum(1, keepdim=True)
    return x.sum_to_size(like.shape)


def _slope(v: Tensor, levels: Levels, learns_rounding: bool) -> tuple[Tensor, Tensor]:
    """Which normalized values lie between the outer levels, and the derivative by the scale, given straight through."""
    inside = (v > levels.low) & (v < levels.high)
    level = nearest(v, levels)
    return inside, level - torch.where(inside, v, 0.0) if learns_rounding else torch.where(inside, 0.0, level)


def _normalized(x: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values in units of the step, from the offset, in float32 at least; and scale and offset in that dtype.

    They are multiplied with ``1 / scale``, as in torch's own fake quantization: the codes are the same to the last bit.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, x = cast(scale, wide), cast(x, wide)
    if offset is not None:
        offset = cast(offset, wide)
        x = x - offset
    return x * scale.reciprocal(), scale, offset


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in another dtype.

    Where there is nothing to cast, to call ``Tensor.to`` in a step of autograd makes ``torch.compile`` of torch 2.11
    return the input as one of its results, whose gradients then are 0.
    """
    return x if x.dtype == dtype else x.to(dtype)


def nearest(v: Tensor, levels: Levels) -> Tensor:
    """The level nearest to each normalized value; NaN stays NaN."""
    if levels.uniform:
        return v.clamp(levels.low, levels.high).round()
    points = cast(levels.points, v.dtype)
    thresholds = (points[1:] + points[:-1]) / 2
    if torch.compiler.is_compiling() and len(points) <= UNROLLED:
        level = points[0].expand_as(v)
        for k in range(len(points) - 1):
            level = torch.where(v >= thresholds[k], points[k + 1], level)
    else:
        level = torch.empty_like(v)  # keeps the memory format, which the lookup does not
        level.copy_(points[torch.bucketize(v.contiguous(), thresholds, right=True)])
    return torch.where(v == v, level, v)
