"""Rounding to the nearest level, with the gradients of learned-step quantization."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qinit.quantizers.kernels import (
    BACKWARD,
    FORWARD,
    TANGENTS,
    Kernels,
    Layout,
    are_compiled,
    backward,
    forward,
    tangents,
)

PART = 2**20  # outputs computed at a time where only their sum is wanted: few enough to stay in the cache


class Rounding(NamedTuple):
    """What is the same for every call of a quantizer.

    Attributes:
        uniform: whether the levels are all integers between two.
        learns_rounding: whether the step receives ``level - v`` between the outer levels, or nothing (PACT).
        gradient_scale: a factor on the gradients of step and offset.
        dtype: of the result.
        kernels: whether to use compiled kernels (see :mod:`~lightning_qinit.quantizers.kernels`).
    """

    uniform: bool
    learns_rounding: bool
    gradient_scale: float
    dtype: torch.dtype
    kernels: Kernels


def round_to_levels(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    points: Tensor,
    rounding: Rounding,
    ready: Tensor | None = None,
) -> Tensor:
    """``scale * level + offset`` with the level nearest to ``v = (x - offset) / scale``.

    Backward: the gradient to ``x`` passes where ``v`` lies between the outer levels. The step receives, times the
    gradient scale, the outer level where ``v`` lies on it or beyond, and ``level - v`` between (LSQ, equation 3); the
    offset 1 where ``v`` lies on the outer levels or beyond (LSQ+, section 3.1). Nothing but ``x`` is kept for it.

    Args:
        x: the values.
        scale: the step, broadcasting against ``x``, with as many axes.
        offset: likewise; ``None`` for 0.
        points: the levels at step 1, 1-D and sorted; the lowest and the highest of them if they are uniform.
        rounding: the constants.
        ready: the result, if it is known.
    """
    result: Tensor = RoundToLevels.apply(x, scale, offset, points, rounding, ready)
    return result


class RoundToLevels(torch.autograd.Function):
    """See :func:`round_to_levels`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        points: Tensor,
        rounding: Rounding,
        ready: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset, points)
        ctx.rounding, ctx.steps, ctx.unpacked = rounding, (scale, offset), None
        ctx.ready, ctx.again, ctx.spent = ready, _again, None
        return _forward(x, scale, offset, points, rounding) if ready is None else ready.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset, points = ctx.saved_tensors if ctx.unpacked is None else ctx.unpacked
        ctx.unpacked = None
        rounding: Rounding = ctx.rounding
        constants = points, rounding.uniform, rounding.learns_rounding
        if are_compiled(x, rounding.kernels):
            layout, force = Layout(x, scale), rounding.kernels == "compiled"
            to_x = layout.empty(x.dtype, x.device) if ctx.spent is None else ctx.spent
            values = layout.flat(to_x), layout.flat(grad), layout.flat(x)
            to_scale, to_offset = BACKWARD(*values, *_columns(scale, offset), *constants, force=force)
        else:
            to_x, to_scale, to_offset = backward(grad, x, scale, offset, *constants)
        ctx.spent = None
        to_scale = to_scale.reshape(scale.shape) * rounding.gradient_scale
        if offset is not None:
            to_offset = to_offset.reshape(offset.shape) * rounding.gradient_scale
        return to_x, to_scale, to_offset, None, None, None


def _forward(x: Tensor, scale: Tensor, offset: Tensor | None, points: Tensor, rounding: Rounding) -> Tensor:
    constants = points, rounding.uniform, rounding.dtype
    if not are_compiled(x, rounding.kernels):
        return forward(x, scale, offset, *constants)
    layout, force = Layout(x, scale), rounding.kernels == "compiled"
    out = layout.empty(rounding.dtype, x.device)
    FORWARD(layout.flat(out), layout.flat(x), *_columns(scale, offset), *constants, force=force)
    return out


@torch.no_grad()
def _again(node: Any) -> Tensor:
    """The result of the forward pass once more, to the same bits, from what is kept for the backward pass."""
    if node.ready is not None:
        return node.ready
    x, scale, offset, points = _unpacked(node)
    result = _forward(x, scale, offset, points, node.rounding)
    if result.dtype == x.dtype and are_compiled(x, node.rounding.kernels):
        # whoever asked for it is done when the backward pass comes to this node: room for the gradient, which is new
        # memory for large tensors otherwise, at the price of another pass
        node.spent = result
    return result


def _unpacked(node: Any) -> Any:
    """What is kept. Activation checkpointing lets it be taken out only once, so it stays at hand until it is used."""
    if node.unpacked is None:
        node.unpacked = node.saved_tensors
    return node.unpacked


def _columns(scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return scale.detach().reshape(-1, 1), None if offset is None else offset.detach().reshape(-1, 1)


class ThroughOutput(torch.autograd.Function):
    """Passes the output of an operation on, and gives step and offset of its quantized input their gradients.

    For an input that needs no gradient itself, such as a batch of data. The output being linear in it, it changes with
    the step by ``operation(tangent, weight)``, and the step's gradient is the inner product of this with the output's:
    one more forward pass of the operation, which is cheaper than its backward pass to a wide input of few channels.

    Args:
        out: ``operation(quantized, weight)``, apart from a bias.
        scale: the step, of one element.
        offset: likewise, or ``None``.
        weight: the weight.
        node: the ``grad_fn`` that :class:`RoundToLevels` gave to ``quantized``.
        operation: linear in its first argument.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        weight: Tensor,
        node: Any,
        operation: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.node, ctx.operation = node, operation
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        x, scale, offset, points = _unpacked(ctx.node)
        rounding: Rounding = ctx.node.rounding
        constants = points, rounding.uniform, rounding.learns_rounding, weight.dtype
        if are_compiled(x, rounding.kernels):
            layout, force = Layout(x, scale), rounding.kernels == "compiled"
            flat = TANGENTS(layout.flat(x), *_columns(scale, offset), *constants, force=force)
            changes = [None if change is None else layout.restored(change) for change in flat]
        else:
            changes = list(tangents(x, scale, offset, *constants))

        def gradient(change: Tensor | None) -> Tensor | None:
            if change is None:
                return None
            batched = x.dim() >= weight.dim()  # of convolutions and matrix products alike
            rows = max(1, PART * len(grad) // max(1, grad.numel()))
            parts = zip(change.split(rows), grad.split(rows), strict=True) if batched else [(change, grad)]
            total = torch.zeros((), dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
            for part, along in parts:
                with torch.autocast(grad.device.type, enabled=False):
                    moved = ctx.operation(part, weight)
                total = total + torch.dot(moved.to(total.dtype).flatten(), along.to(total.dtype).flatten())
            return total.reshape(scale.shape) * rounding.gradient_scale

        to_scale, to_offset = (gradient(change) for change in changes)
        return grad, to_scale, to_offset, None, None, None
