"""Parameters in units of where they started, with the gradient that they would have in units of the data."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qinit.quantizers.kernels import is_tracing


class Bounds(NamedTuple):
    """How far a parameter may move from where it started.

    Attributes:
        low: the least value.
        high: the greatest.
        default: stands in for NaN.
    """

    low: float
    high: float
    default: float


# A step may move this far from where it started, either way. Steps of trained networks move by tens of percent
# (LSQ, section 3.5), so the bounds only catch a step that ran away.
MAX_DRIFT = 2**16  # an integer: to torch.compile(dynamic=True) a float outside of functions is an input that may change


def of_step() -> Bounds:
    """Of a step."""
    return Bounds(1 / MAX_DRIFT, float(MAX_DRIFT), 1.0)


def of_offset() -> Bounds:
    """Of an offset."""
    return Bounds(-float(MAX_DRIFT), float(MAX_DRIFT), 0.0)


class _Relative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, start: Tensor | None, unit: Tensor, bounds: Bounds) -> Tensor:
        ctx.save_for_backward(value, unit)
        ctx.bounds = bounds
        return known(value, start, unit, bounds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, unit = ctx.saved_tensors
        return gradient(grad, value, unit, ctx.bounds), None, None, None


def known(value: Tensor, start: Tensor | None, unit: Tensor, bounds: Bounds) -> Tensor:
    """:func:`relative`, as operations that autograd would record."""
    within = value.nan_to_num(bounds.default, bounds.high, bounds.low).clamp(bounds.low, bounds.high)
    return within * unit if start is None else start + within * unit


def gradient(grad: Tensor, value: Tensor, unit: Tensor, bounds: Bounds) -> Tensor:
    """The gradient to ``value``, given that to the result of :func:`relative`."""
    # gradient descent moves against the gradient: drop what would carry the value further outside
    inward = torch.where(value >= bounds.high, grad.clamp(min=0), grad)
    return torch.where(value <= bounds.low, grad.clamp(max=0), inward) / unit


def relative(value: Tensor, start: Tensor | None, unit: Tensor, bounds: Bounds) -> Tensor:
    """``start + unit * value``, with ``value`` clipped to its bounds.

    Steps differ by orders of magnitude from layer to layer. An optimizer that normalizes gradients (Adam) moves every
    parameter by about its learning rate, which is more than a whole step where steps are small; in units of its start
    a step moves by the learning rate's fraction. The gradient is divided by the unit (where the chain rule would
    multiply), so that plain gradient descent, momentum included, moves the result exactly as it would move the step
    itself: ``-lr * gradient``, the published method.

    At a bound the gradient is projected, as projected gradient descent does: a component that leads back inside
    passes, one that leads further out is dropped, so the parameter is never stuck outside. Softplus or a logarithm
    would keep a step positive too, but rescale its gradient everywhere.

    Args:
        value: the parameter, any shape.
        start: what ``value`` 0 stands for, same shape; ``None`` for 0.
        unit: positive, same shape.
        bounds: of ``value``.
    """
    # a trace asks for no gradient, and records operations, not functions
    if is_tracing() or not torch.is_grad_enabled():
        return known(value, start, unit, bounds)
    result: Tensor = _Relative.apply(value, start, unit, bounds)
    return result
