"""The passes of a quantizer as Triton kernels.

On a GPU, to call a function of ``torch.compile`` takes the host longer than the pass takes the device: guards are
checked for every one of the hundred passes of a training step. A Triton kernel is launched at once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 256, 4096  # values of one program: two sizes, so that few kernels are compiled
BIAS = tl.constexpr(1.5 * 2**23)  # added and taken away, it rounds float32 to integers, halves to even
PRECISE = {"enable_fp_fusion": False}  # the codes are those of the chain of operations, to the last bit


def handles(*arguments: Any) -> bool:
    """Whether these kernels compute such a pass: they do in float32."""
    return not any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in arguments)


def forward_into(
    out: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    points: Tensor,
    uniform: bool,
    dtype: torch.dtype,
) -> None:
    """As :func:`~lightning_qinit.quantizers.kernels.forward_into`, on ``(channels, values)``."""
    grid, sizes = _programs(x)
    _forward[grid](out, x, scale, offset, points, *sizes, *_constants(points, uniform), **PRECISE)


def backward_into(
    out: Tensor,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    points: Tensor,
    uniform: bool,
    learns_rounding: bool,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`~lightning_qinit.quantizers.kernels.backward_into`, on ``(channels, values)``."""
    grid, sizes = _programs(x)
    parts = torch.empty((1 if offset is None else 2, len(x), sizes[1]), dtype=torch.float32, device=x.device)
    constants = *_constants(points, uniform), learns_rounding
    _backward[grid](out, grad, x, scale, offset, points, parts, parts.stride(0), *sizes, *constants, **PRECISE)
    sums = parts.sum(2, keepdim=True)
    return sums[0], None if offset is None else sums[1]


def backward_over(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """As :func:`~lightning_qinit.quantizers.kernels.backward_over`, on ``(channels, values)``."""
    return backward_into(grad, grad, *arguments)


def _programs(x: Tensor) -> tuple[tuple[int], tuple[int, int, int]]:
    """The number of programs; and the values of a channel, its blocks, and their size."""
    channels, values = x.shape
    block = BLOCKS[values > BLOCKS[0]]
    blocks = triton.cdiv(values, block)
    return (channels * blocks,), (values, blocks, block)


def _constants(points: Tensor, uniform: bool) -> tuple[int, int]:
    """The number of levels, and the steps of a search among them; 0 where rounding finds the level."""
    count = len(points)
    return count, 0 if uniform else (count - 1).bit_length()


@triton.jit  # type: ignore[untyped-decorator]
def _place(values, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a program: its channel, where its values begin, and which of a block there are."""
    channel = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK
    index = tl.arange(0, BLOCK)
    return channel, channel.to(tl.int64) * values + first, index, index < values - first


@triton.jit
def _normalized(x, scale, offset, channel):  # type: ignore[no-untyped-def]
    """Values in units of the step, from the offset; step and offset."""
    s = tl.load(scale + channel)
    o = 0.0
    if offset is not None:
        o = tl.load(offset + channel)
        x = x - o
    return x * tl.div_rn(1.0, s), s, o


@triton.jit  # type: ignore[untyped-decorator]
def _nearest(v, points, low, high, COUNT: tl.constexpr, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The level nearest to each normalized value, the upper one of two; NaN stays NaN."""
    if DEPTH == 0:
        level = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
        level = tl.minimum(level, high, propagate_nan=tl.PropagateNan.ALL)
        level = (level + BIAS) - BIAS
    else:
        place = tl.zeros(v.shape, dtype=tl.int32)
        for k in tl.static_range(DEPTH):
            probe = place + (1 << (DEPTH - 1 - k))
            exists = probe < COUNT
            above = tl.load(points + probe, mask=exists, other=0.0)
            below = tl.load(points + probe - 1, mask=exists, other=0.0)
            place = tl.where(exists & (v >= (above + below) / 2), probe, place)
        level = tl.where(v == v, tl.load(points + place), v)
    return level


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    out, x, scale, offset, points, values, blocks, BLOCK: tl.constexpr, COUNT: tl.constexpr, DEPTH: tl.constexpr
):
    channel, first, index, there = _place(values, blocks, BLOCK)
    v, s, o = _normalized(tl.load(x + first + index, mask=there).to(tl.float32), scale, offset, channel)
    y = _nearest(v, points, tl.load(points), tl.load(points + COUNT - 1), COUNT, DEPTH) * s
    if offset is not None:
        y = y + o
    tl.store(out + first + index, y.to(out.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    out,
    grad,
    x,
    scale,
    offset,
    points,
    parts,
    second,
    values,
    blocks,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DEPTH: tl.constexpr,
    LEARNS_ROUNDING: tl.constexpr,
):
    channel, first, index, there = _place(values, blocks, BLOCK)
    v, _, _ = _normalized(tl.load(x + first + index, mask=there, other=0.0).to(tl.float32), scale, offset, channel)
    g = tl.load(grad + first + index, mask=there, other=0.0)
    wide = g.to(tl.float32)
    low, high = tl.load(points), tl.load(points + COUNT - 1)
    inside = (v > low) & (v < high)
    slope = _nearest(v, points, low, high, COUNT, DEPTH)
    if LEARNS_ROUNDING:
        slope = slope - tl.where(inside, v, 0.0)
    else:
        slope = tl.where(inside, 0.0, slope)
    tl.store(out + first + index, tl.where(inside, wide, 0.0).to(out.dtype.element_ty), mask=there)
    tl.store(parts + tl.program_id(0), tl.sum(wide * slope, 0))
    if offset is not None:
        tl.store(parts + second + tl.program_id(0), tl.sum(tl.where(inside, 0.0, wide), 0))
