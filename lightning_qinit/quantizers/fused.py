"""A layer's operation on quantized operands as one step of autograd, which keeps and sees only float values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qinit.quantizers.operation import Operation
from lightning_qinit.quantizers.rounding import Rounding, changes, gradients, rounded
from lightning_qinit.quantizers.scratch import Scratch
from lightning_qinit.quantizers.straight_through import round_to_levels

INPUT, WEIGHT = Scratch(), Scratch()


class Operand(NamedTuple):
    """A tensor that an operation uses.

    Attributes:
        x: the values.
        how: how they are rounded before; ``None`` for not at all.
        watch: called with the rounded values.
    """

    x: Tensor
    how: Rounding | None = None
    watch: Callable[[Tensor], None] | None = None


def fused(operation: Operation, x: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
    """``operation(rounded x, rounded weight, bias)``.

    To differentiate, an operation keeps its input and its weight. Here those are what they were before rounding, which
    a float model keeps as well; they are rounded once more, to the same bits, when the backward pass comes: a pass over
    the values instead of 4 bytes for each. And since nobody else sees the quantized values and the gradients to them,
    the former lie in memory that all layers share, and the latter become the gradients to the float values in place.

    Args:
        operation: linear in the input and in the weight.
        x: the input.
        weight: the weight.
        bias: added to the output.
    """
    steps = [(None, None) if how is None else (how.scale, how.offset) for _, how, _ in (x, weight)]
    result: Tensor = Fused.apply(x.x, *steps[0], weight.x, *steps[1], bias, operation, x, weight)
    return result


class Fused(torch.autograd.Function):
    """See :func:`fused`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        weight: Tensor,
        weight_scale: Tensor | None,
        weight_offset: Tensor | None,
        bias: Tensor | None,
        operation: Operation,
        *operands: Operand,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset, weight, weight_scale, weight_offset)
        ctx.operation, ctx.constants = (
            operation,
            [how and how._replace(scale=None, offset=None) for _, how, _ in operands],
        )
        used = [_used(x, how, scratch) for (x, how, _), scratch in zip(operands, (INPUT, WEIGHT), strict=True)]
        for operand, values in zip(operands, used, strict=True):
            if operand.watch is not None:
                operand.watch(values)
        return operation(*used, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset, weight, weight_scale, weight_offset = ctx.saved_tensors
        steps = (scale, offset), (weight_scale, weight_offset)
        how, how_weight = (
            constants and constants._replace(scale=scale, offset=offset)
            for constants, (scale, offset) in zip(ctx.constants, steps, strict=True)
        )
        needs = ctx.needs_input_grad
        used, used_weight = _used(x, how, INPUT), _used(weight, how_weight, WEIGHT)
        of_data = not needs[0] and how is not None and how.scale.numel() == 1
        wanted = any(needs[:3]) and not of_data, any(needs[3:6]), needs[6]
        to_x, to_weight, to_bias = ctx.operation.backward(grad, used, used_weight, *wanted)
        if of_data and any(needs[1:3]):
            to_input = (None, *_of_data(ctx.operation, grad, x, how, used_weight))
        else:
            to_input = _gradients(to_x, x, how)
        return *to_input, *_gradients(to_weight, weight, how_weight), to_bias, None, None, None


def _of_data(operation: Operation, grad: Tensor, x: Tensor, how: Rounding, weight: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients to step and offset of an input that needs none itself, such as a batch of data.

    The gradient to a wide input of few channels costs more than anything else in its layer. The output being linear in
    input and weight, the inner product of that gradient with any change of the input is that of the weight with the
    gradient which the weight would have if the change were the input.
    """

    def gradient(change: Tensor | None) -> Tensor | None:
        if change is None:
            return None
        _, moved, _ = operation.backward(grad, change, weight, False, True, False)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (moved.to(wide) * weight.to(wide)).sum().reshape(how.scale.shape) * how.gradient_scale

    return tuple(gradient(change) for change in changes(x, how))


def _gradients(grad: Tensor | None, x: Tensor, how: Rounding | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    if how is None:
        return grad.to(x.dtype), None, None
    return gradients(grad, x, how, private=not torch.is_grad_enabled())


def _used(x: Tensor, how: Rounding | None, scratch: Scratch) -> Tensor:
    if how is None:
        return x
    # a backward pass that is differentiated itself knows the rounding's derivatives, and keeps the result
    return round_to_levels(x, how) if torch.is_grad_enabled() else rounded(x, how, scratch)
