"""A layer's operation on quantized operands as one step of autograd, which keeps and sees only float values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qinit.quantizers.formats import FIRST, LAST, is_last, laid_out
from lightning_qinit.quantizers.operation import Operation
from lightning_qinit.quantizers.rounding import Rounding, changes, gradients, rounded, rounded_with_gradients, scaled
from lightning_qinit.quantizers.scratch import Scratch
from lightning_qinit.quantizers.straight_through import round_to_levels

Part = tuple[Tensor | None, Tensor | None, Tensor | None]  # the gradients to values, step and offset

INPUT, WEIGHT, GRADIENT = Scratch(), Scratch(), Scratch()


def release_scratch() -> None:
    """Give the memory back that the layers of this thread share."""
    for scratch in (INPUT, WEIGHT, GRADIENT):
        scratch.release()


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
    the values instead of 4 bytes for each. (Of a weight in a wider dtype than the operation's, as under autocast, a
    float model keeps a copy; here that is the quantized one.) And since nobody else sees the quantized values and the
    gradients to them, the former lie in memory that all layers share, and the latter become the gradients to the float
    values in place. Where an operation is faster on images with their channels last in memory, those of a float model
    being first, they are quantized to lie so, and the result is laid out again as that of a float model.

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
        how, how_weight = x.how, weight.how
        if how is not None:
            how = how._replace(format=operation.fastest(x.x))
        used = _used(x.x, how, INPUT)
        turned = is_last(used) and not is_last(x.x)
        if turned and how_weight is not None:
            how_weight = how_weight._replace(format=LAST)
        narrowed = how_weight is not None and how_weight.dtype.itemsize < weight.x.dtype.itemsize
        used_weight = _used(weight.x, how_weight, None if narrowed else WEIGHT)
        ctx.save_for_backward(*tensors, used_weight if narrowed else None)
        ctx.operation, ctx.how, ctx.how_weight, ctx.turned = operation, how, how_weight, turned
        for operand, values in ((x, used), (weight, used_weight)):
            if operand.watch is not None:
                operand.watch(values)
        result: Tensor = operation(used, used_weight, bias)
        if how is not None and turned:
            result = laid_out(result, FIRST, how.kernels)
        return result.data  # of a product it may be a view, which could not be changed in place later

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, _, _, weight, _, _, used_weight = ctx.saved_tensors  # raises if one of them was changed since
        operation: Operation = ctx.operation
        how, how_weight = ctx.how, ctx.how_weight
        of_input, of_weight, of_bias = (
            any(ctx.needs_input_grad[:3]),
            any(ctx.needs_input_grad[3:6]),
            ctx.needs_input_grad[6],
        )
        if used_weight is None or torch.is_grad_enabled():
            used_weight = _used(weight, how_weight, WEIGHT)
        like = x  # the input is not read for the gradient to it: shape, dtype and format are enough
        if ctx.turned and not torch.is_grad_enabled():
            grad = laid_out(grad, LAST, how.kernels, GRADIENT)
            like = INPUT.empty(x, how.dtype, LAST)
        read = of_weight or (how is not None and like.dtype != how.dtype)
        if of_input and how is not None and how.scale.numel() == 1 and not ctx.needs_input_grad[0]:
            used = _used(x, how, INPUT) if read else like
            to_input, to_weight, to_bias = _of_data(operation, grad, x, how, used, used_weight, of_weight, of_bias)
        elif of_input and of_weight and how is not None and _in_one_pass(x, how):
            to_x, _, _ = operation.backward(grad, like, used_weight, (True, False, False))
            assert to_x is not None
            used, to_input = rounded_with_gradients(to_x, x, how, INPUT)
            _, to_weight, to_bias = operation.backward(grad, used, used_weight, (False, True, of_bias))
        else:
            used = _used(x, how, INPUT) if read else like
            wanted = of_input, of_weight, of_bias
            to_x, to_weight, to_bias = operation.backward(grad, used, used_weight, wanted)
            to_input = _gradients(to_x, x, how)
        return *to_input, *_gradients(to_weight, weight, how_weight), to_bias, None, None, None


def on_data(operation: Operation, x: Tensor, how: Rounding, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``operation(rounded x, weight, bias)`` of an input that needs no gradient, such as a batch of data.

    For graphs that are compiled: the step learns as in :func:`fused`, without the gradient to the input.
    """
    result: Tensor = OnData.apply(x, how.scale, how.offset, weight, bias, operation, how)
    return result


class OnData(torch.autograd.Function):
    """See :func:`on_data`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        operation: Operation,
        how: Rounding,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset, weight)
        ctx.operation, ctx.how = operation, how
        return operation(rounded(x, how), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset, weight = ctx.saved_tensors
        how = ctx.how._replace(scale=scale, offset=offset)
        wanted = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        to_input, to_weight, to_bias = _of_data(ctx.operation, grad, x, how, rounded(x, how), weight, *wanted)
        return *to_input, to_weight, to_bias, None, None


def _of_data(
    operation: Operation,
    grad: Tensor,
    x: Tensor,
    how: Rounding,
    used: Tensor,
    weight: Tensor,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Part, Tensor | None, Tensor | None]:
    """The gradients to an input that needs none itself, such as a batch of data, but its step and offset; and
    those to weight and bias that are wanted.

    The gradient to a wide input of few channels costs more than anything else in its layer. The output being linear in
    the input, the inner product of that gradient with a change of the input is that of the output's gradient with the
    change of the output.
    """
    moves = [change for change in changes(x, how) if change is not None]
    to_weight, to_bias, found = operation.of_data(grad, used, moves, weight, of_weight, of_bias)
    by_scale, *by_offset = found
    return (None, *scaled(how, by_scale, by_offset[0] if by_offset else None)), to_weight, to_bias


def _in_one_pass(x: Tensor, how: Rounding) -> bool:
    """Whether an input is best rounded again when its gradient is there, in one pass for both.

    The gradient is found without the input, of which it needs the shape alone. On a CPU an operation finds the
    gradients one after the other; a GPU would wait for the host, to which they are two operations.
    """
    return x.is_cpu and x.dtype == how.dtype and not torch.is_grad_enabled()


def _gradients(grad: Tensor | None, x: Tensor, how: Rounding | None) -> Part:
    if grad is None:
        return None, None, None
    if how is None:
        return grad.to(x.dtype), None, None
    return gradients(grad, x, how, private=not torch.is_grad_enabled())


def _used(x: Tensor, how: Rounding | None, scratch: Scratch | None) -> Tensor:
    if how is None:
        return x
    # a backward pass that is differentiated itself knows the rounding's derivatives, and keeps the result
    return round_to_levels(x, how) if torch.is_grad_enabled() else rounded(x, how, scratch)


def _tensors(operand: Operand) -> tuple[Tensor | None, ...]:
    x, how, _ = operand
    return (x, None, None) if how is None else (x, how.scale, how.offset)
