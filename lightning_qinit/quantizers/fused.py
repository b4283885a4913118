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


def release_scratch() -> None:
    """Give the memory back that the layers of this thread share."""
    INPUT.release()
    WEIGHT.release()


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
    result: Tensor = Fused.apply(*_tensors(x), *_tensors(weight), bias, operation, x, weight)
    return result


class Fused(torch.autograd.Function):
    """See :func:`fused`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, bias, operation, x, weight = arguments
        ctx.save_for_backward(*tensors)
        ctx.operation, ctx.constants = operation, (_constants(x.how), _constants(weight.how))
        used = _used(x.x, x.how, INPUT), _used(weight.x, weight.how, WEIGHT)
        for operand, values in zip((x, weight), used, strict=True):
            if operand.watch is not None:
                operand.watch(values)
        result: Tensor = operation(*used, bias)
        return result.data  # of a product it may be a view, which could not be changed in place later

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset, weight, weight_scale, weight_offset = ctx.saved_tensors
        how = _with(ctx.constants[0], scale, offset)
        how_weight = _with(ctx.constants[1], weight_scale, weight_offset)
        operation: Operation = ctx.operation
        of_input, of_weight, of_bias = (
            any(ctx.needs_input_grad[:3]),
            any(ctx.needs_input_grad[3:6]),
            ctx.needs_input_grad[6],
        )
        data_only = how is not None and how.scale.numel() == 1 and not ctx.needs_input_grad[0]
        used, used_weight = _used(x, how, INPUT), _used(weight, how_weight, WEIGHT)
        wanted = of_input and not data_only, of_weight, of_bias
        to_x, to_weight, to_bias = operation.backward(grad, used, used_weight, wanted) if any(wanted) else 3 * (None,)
        to_input = _gradients(to_x, x, how)
        if how is not None and data_only and of_input:
            to_input = None, *_of_data(operation, grad, x, how, used_weight)
        return *to_input, *_gradients(to_weight, weight, how_weight), to_bias, None, None, None


def _of_data(
    operation: Operation, grad: Tensor, x: Tensor, how: Rounding, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to step and offset of an input that needs none itself, such as a batch of data.

    The gradient to a wide input of few channels costs more than anything else in its layer. The output being linear in
    input and weight, the inner product of that gradient with any change of the input is that of the weight with the
    gradient which the weight would have if the change were the input.
    """

    def gradient(change: Tensor | None) -> Tensor | None:
        if change is None:
            return None
        moved = operation.backward(grad, change, weight, (False, True, False))[1]
        assert moved is not None
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (moved.to(wide) * weight.to(wide)).sum().reshape(how.scale.shape) * how.gradient_scale

    by_scale, by_offset = changes(x, how)
    return gradient(by_scale), gradient(by_offset)


def _gradients(
    grad: Tensor | None, x: Tensor, how: Rounding | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
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


def _tensors(operand: Operand) -> tuple[Tensor | None, ...]:
    x, how, _ = operand
    return (x, None, None) if how is None else (x, how.scale, how.offset)


def _constants(how: Rounding | None) -> Rounding | None:
    return how and how.constants


def _with(how: Rounding | None, scale: Tensor, offset: Tensor | None) -> Rounding | None:
    return how and how._replace(scale=scale, offset=offset)
