"""The passes of a quantizer as Triton kernels.

On a GPU, to call a function of ``torch.compile`` takes the host longer than the pass takes the device: its guards are
checked at every one of the hundred passes of a training step. A Triton kernel is launched at once, on the values where
they lie.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qinit.quantizers.layout import Layout

if TYPE_CHECKING:
    from lightning_qinit.quantizers.rounding import Gradients, Rounding

BLOCKS = 256, 4096  # values of one program: two sizes, so that few kernels are compiled
BIAS = tl.constexpr(1.5 * 2**23)  # added and taken away, it rounds float32 to integers, halves to even
PRECISE = {"enable_fp_fusion": False}  # the codes are those of the chain of operations, to the last bit


def check(device: torch.device) -> None:
    """Raise whatever keeps these kernels from running on a device."""
    x = torch.ones(1, device=device)
    _forward[(1,)](torch.empty_like(x), x, x, None, x, 1, 1, BLOCKS[0], 1, 0, **PRECISE)


def rounded(x: Tensor, how: "Rounding") -> Tensor:
    """As :func:`~lightning_qinit.quantizers.rounding.rounded`."""
    layout = _layout(x, how)
    values = x if layout is None else layout.flat(x).contiguous()
    out = torch.empty_like(values, dtype=how.dtype)
    _launch(_forward, how, values, out)
    return out if layout is None else layout.restored(out)


def gradients(grad: Tensor, x: Tensor, how: "Rounding", private: bool) -> "Gradients":
    """As :func:`~lightning_qinit.quantizers.rounding.gradients`."""
    layout = _layout(x, how)
    if layout is not None:
        values, grad, private = layout.flat(x).contiguous(), layout.flat(grad).contiguous(), False
    elif grad.stride() != x.stride():
        values, grad, private = x, torch.empty_like(x, dtype=grad.dtype).copy_(grad), True
    else:
        values = x
    to_x = grad if private and grad.dtype == x.dtype else torch.empty_like(values)
    sums = torch.empty((1 if how.offset is None else 2, *_blocks(how, x)), dtype=torch.float32, device=x.device)
    _launch(_backward, how, values, to_x, grad, sums, sums.stride(0), how.gradient_scale, LEARNS=how.learns_rounding)
    to_scale, *to_offset = (part.view(how.scale.shape) for part in sums.sum(2))
    return to_x if layout is None else layout.restored(to_x), to_scale, to_offset[0] if to_offset else None


def changes(x: Tensor, how: "Rounding") -> tuple[Tensor, Tensor | None]:
    """As :func:`~lightning_qinit.quantizers.rounding.changes`."""
    layout = _layout(x, how)
    values = x if layout is None else layout.flat(x).contiguous()
    found = [torch.empty_like(values, dtype=how.dtype) for _ in range(1 if how.offset is None else 2)]
    _launch(_tangents, how, values, found[0], found[-1], LEARNS=how.learns_rounding)
    by_scale, *by_offset = found if layout is None else map(layout.restored, found)
    return by_scale, by_offset[0] if by_offset else None


def _layout(x: Tensor, how: "Rounding") -> Layout | None:
    """How to bring values to rows of channels; ``None`` where they lie so, without gaps."""
    if how.scale.numel() == 1 or how.scale.shape[0] > 1:
        kinds = torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.dim(), [])
        if any(x.is_contiguous(memory_format=kind) for kind in kinds):
            return None
    return Layout(x, how.scale)


def _blocks(how: "Rounding", x: Tensor) -> tuple[int, int]:
    """Into how many parts values are cut: channels, and blocks of each."""
    channels = how.scale.numel()
    count = x.numel() // channels
    return channels, triton.cdiv(count, BLOCKS[count > BLOCKS[0]])


def _launch(kernel: Any, how: "Rounding", x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on every block of the values, which lie in rows of channels."""
    channels, blocks = _blocks(how, x)
    count, levels = x.numel() // channels, len(how.points)
    depth = 0 if how.uniform else (levels - 1).bit_length()  # steps of a search among the levels
    sizes = count, blocks, BLOCKS[count > BLOCKS[0]], levels, depth
    kernel[(channels * blocks,)](*arguments, x, how.scale, how.offset, how.points, *sizes, **constants, **PRECISE)


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
def _slope(v, points, COUNT: tl.constexpr, DEPTH: tl.constexpr, LEARNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which normalized values lie between the outer levels, and the derivative by the scale, given straight through."""
    low, high = tl.load(points), tl.load(points + COUNT - 1)
    inside = (v > low) & (v < high)
    level = _nearest(v, points, low, high, COUNT, DEPTH)
    if LEARNS:
        slope = level - tl.where(inside, v, 0.0)
    else:
        slope = tl.where(inside, 0.0, level)
    return inside, slope


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
    sums,
    second,
    factor,
    x,
    scale,
    offset,
    points,
    values,
    blocks,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DEPTH: tl.constexpr,
    LEARNS: tl.constexpr,
):
    channel, first, index, there = _place(values, blocks, BLOCK)
    v, _, _ = _normalized(tl.load(x + first + index, mask=there, other=0.0).to(tl.float32), scale, offset, channel)
    g = tl.load(grad + first + index, mask=there, other=0.0).to(tl.float32)
    inside, slope = _slope(v, points, COUNT, DEPTH, LEARNS)
    tl.store(out + first + index, tl.where(inside, g, 0.0).to(out.dtype.element_ty), mask=there)
    tl.store(sums + tl.program_id(0), tl.sum(g * slope, 0) * factor)
    if offset is not None:
        tl.store(sums + second + tl.program_id(0), tl.sum(tl.where(inside, 0.0, g), 0) * factor)


@triton.jit  # type: ignore[untyped-decorator]
def _tangents(  # type: ignore[no-untyped-def]
    by_scale,
    by_offset,
    x,
    scale,
    offset,
    points,
    values,
    blocks,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DEPTH: tl.constexpr,
    LEARNS: tl.constexpr,
):
    channel, first, index, there = _place(values, blocks, BLOCK)
    v, _, _ = _normalized(tl.load(x + first + index, mask=there, other=0.0).to(tl.float32), scale, offset, channel)
    inside, slope = _slope(v, points, COUNT, DEPTH, LEARNS)
    tl.store(by_scale + first + index, slope.to(by_scale.dtype.element_ty), mask=there)
    if offset is not None:
        tl.store(by_offset + first + index, tl.where(inside, 0.0, 1.0).to(by_offset.dtype.element_ty), mask=there)
