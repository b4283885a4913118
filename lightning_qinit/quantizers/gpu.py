"""The passes of a quantizer as Triton kernels.

On a GPU, to call a function of ``torch.compile`` takes the host longer than the pass takes the device: its guards are
checked at every one of the hundred passes of a training step. A Triton kernel is launched at once, on the values where
they lie. Each pass is a single launch, from step and offset as they are stored to the gradients to those: what is left
to do for the host decides how fast a training step is.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qinit.functional.fake_quantize import broadcast_channels
from lightning_qinit.quantizers import relative
from lightning_qinit.quantizers.layout import Layout
from lightning_qinit.quantizers.scratch import Scratch

if TYPE_CHECKING:
    from lightning_qinit.quantizers.rounding import Gradients, Rounding

BLOCKS = 256, 2048, 8192  # values of one program: few sizes, so that few kernels are compiled
BIAS = tl.constexpr(1.5 * 2**23)  # added and taken away, it rounds float32 to integers, halves to even
DRIFT = tl.constexpr(float(relative.MAX_DRIFT))
PRECISE = {"enable_fp_fusion": False}  # the codes are those of the chain of operations, to the last bit


def check(device: torch.device) -> None:
    """Raise whatever keeps these kernels from running on a device."""
    x = torch.ones(1, device=device)
    _forward[(1,)](torch.empty_like(x), x, x, None, None, None, x, 1, 1, min(BLOCKS), 1, 0, **PRECISE)


def rounded(x: Tensor, how: "Rounding", scratch: Scratch | None) -> Tensor:
    """As :func:`~lightning_qinit.quantizers.rounding.rounded`, in new memory, since torch keeps what is freed."""
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
    to_scale = torch.empty_like(how.scale, dtype=torch.float32)
    to_offset = None if how.offset is None else torch.empty_like(to_scale)
    channels, _, blocks, _ = _blocks(how, x)
    sums = ready = None
    if blocks > 1:
        sums = torch.empty((1 if to_offset is None else 2) * channels * blocks, dtype=torch.float32, device=x.device)
        ready = torch.zeros(channels, dtype=torch.int32, device=x.device)
    results = to_x, grad, to_scale, to_offset, sums, ready
    _launch(_backward, how, values, *results, how.gradient_scale, LEARNS=how.learns_rounding)
    return to_x if layout is None else layout.restored(to_x), to_scale, to_offset


def rounded_with_gradients(grad: Tensor, x: Tensor, how: "Rounding", scratch: Scratch) -> tuple[Tensor, "Gradients"]:
    """As :func:`~lightning_qinit.quantizers.rounding.rounded_with_gradients`."""
    return rounded(x, how, scratch), gradients(grad, x, how, True)


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
    if how.scale.numel() == 1 or how.axis == 0:
        kind = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        if x.is_contiguous() or (kind is not None and x.is_contiguous(memory_format=kind)):
            return None
    return Layout(x, broadcast_channels(how.scale, x, how.axis))


def _blocks(how: "Rounding", x: Tensor) -> tuple[int, int, int, int]:
    """Into how many parts values are cut: channels, values of each, blocks of each, and values of a block at most."""
    channels = how.scale.numel()
    count = x.numel() // channels
    small, middle, large = BLOCKS
    block = small if count <= small else middle if count <= middle else large
    return channels, count, -(-count // block), block


def _launch(kernel: Any, how: "Rounding", x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on every block of the values, which lie in rows of channels."""
    channels, count, blocks, block = _blocks(how, x)
    levels = how.levels.points.shape[0]
    depth = 0 if how.levels.uniform else (levels - 1).bit_length()  # steps of a search among the levels
    kernel[(channels * blocks,)](
        *arguments,
        x,
        *how.read,
        count,
        blocks,
        block,
        levels,
        depth,
        num_warps=8 if block == BLOCKS[-1] else 4,
        **constants,
        **PRECISE,
    )


@triton.jit
def _within(value, low, high, default):  # type: ignore[no-untyped-def]
    """A parameter within its bounds (see ``relative``)."""
    return tl.where(value == value, tl.minimum(tl.maximum(value, low), high), default)


@triton.jit
def _of_value(grad, value, unit, low, high):  # type: ignore[no-untyped-def]
    """The gradient to a parameter that is stored in units (see ``relative.gradient``)."""
    grad = tl.where((value >= high) & (grad < 0), 0.0, grad)
    grad = tl.where((value <= low) & (grad > 0), 0.0, grad)
    return tl.div_rn(grad, unit)


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]
    x, scale, unit, offset, start, values, blocks, BLOCK: tl.constexpr
):
    """Of a program: its channel, where its values lie, which of a block there are; them in units of the step, from the
    offset; step and offset."""
    channel = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK
    index = tl.arange(0, BLOCK)
    at, there = channel.to(tl.int64) * values + first + index, index < values - first
    x = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    s = tl.load(scale + channel)
    o = 0.0
    if offset is not None:
        o = tl.load(offset + channel)
    if unit is not None:
        u = tl.load(unit + channel)
        s = _within(s, 1.0 / DRIFT, DRIFT, 1.0) * u
        if offset is not None:
            o = tl.load(start + channel) + _within(o, -DRIFT, DRIFT, 0.0) * u
    if offset is not None:
        x = x - o
    return channel, at, there, x * tl.div_rn(1.0, s), s, o


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
    out,
    x,
    scale,
    unit,
    offset,
    start,
    points,
    values,
    blocks,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    _, at, there, v, s, o = _read(x, scale, unit, offset, start, values, blocks, BLOCK)
    y = _nearest(v, points, tl.load(points), tl.load(points + COUNT - 1), COUNT, DEPTH) * s
    if offset is not None:
        y = y + o
    tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _total(part, sums, channel, blocks, last, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum over all blocks of a channel, in the same order every time; right in the last program alone."""
    if sums is None:
        total = part
    else:
        index = tl.arange(0, BLOCK)
        parts = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, tl.where(last, blocks, 0), BLOCK):
            found = sums + channel * blocks + first + index
            # written by other programs: not to be had from this processor's own cache
            parts += tl.load(found, mask=first + index < blocks, other=0.0, cache_modifier=".cg")
        total = tl.sum(parts, 0)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    out,
    grad,
    to_scale,
    to_offset,
    sums,
    ready,
    factor,
    x,
    scale,
    unit,
    offset,
    start,
    points,
    values,
    blocks,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DEPTH: tl.constexpr,
    LEARNS: tl.constexpr,
):
    channel, at, there, v, _, _ = _read(x, scale, unit, offset, start, values, blocks, BLOCK)
    g = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    inside, slope = _slope(v, points, COUNT, DEPTH, LEARNS)
    tl.store(out + at, tl.where(inside, g, 0.0).to(out.dtype.element_ty), mask=there)

    # each program leaves its sums, and the last one of a channel adds them up
    by_scale, by_offset = tl.sum(g * slope, 0), 0.0
    if offset is not None:
        by_offset = tl.sum(tl.where(inside, 0.0, g), 0)
    last = True
    second = None
    if sums is not None:
        tl.store(sums + tl.program_id(0), by_scale)
        if offset is not None:
            second = sums + tl.num_programs(0)
            tl.store(second + tl.program_id(0), by_offset)
        tl.debug_barrier()
        last = tl.atomic_add(ready + channel, 1, sem="acq_rel") == blocks - 1
    by_scale = _total(by_scale, sums, channel, blocks, last, BLOCK) * factor
    if unit is not None:
        by_scale = _of_value(by_scale, tl.load(scale + channel), tl.load(unit + channel), 1.0 / DRIFT, DRIFT)
    tl.store(to_scale + channel, by_scale, mask=last)
    if offset is not None:
        by_offset = _total(by_offset, second, channel, blocks, last, BLOCK) * factor
        if unit is not None:
            by_offset = _of_value(by_offset, tl.load(offset + channel), tl.load(unit + channel), -DRIFT, DRIFT)
        tl.store(to_offset + channel, by_offset, mask=last)


@triton.jit  # type: ignore[untyped-decorator]
def _tangents(  # type: ignore[no-untyped-def]
    by_scale,
    by_offset,
    x,
    scale,
    unit,
    offset,
    start,
    points,
    values,
    blocks,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    DEPTH: tl.constexpr,
    LEARNS: tl.constexpr,
):
    _, at, there, v, _, _ = _read(x, scale, unit, offset, start, values, blocks, BLOCK)
    inside, slope = _slope(v, points, COUNT, DEPTH, LEARNS)
    tl.store(by_scale + at, slope.to(by_scale.dtype.element_ty), mask=there)
    if offset is not None:
        tl.store(by_offset + at, tl.where(inside, 0.0, 1.0).to(by_offset.dtype.element_ty), mask=there)
