"""Parameters in units of where they started, with the gradient that they would have in units of the data."""

from typing import Any

import torch
from torch import Tensor

from lightning_qinit.quantizers.kernels import is_tracing


class _Relative(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, start: Tensor | None, unit: Tensor, low: float, high: float, default: float
    ) -> Tensor:
        ctx.save_for_backward(value, unit)
        ctx.bounds = (low, high)
        return _value(value, start, unit, low, high, default)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, unit = ctx.saved_tensors
        low, high = ctx.bounds
        # gradient descent moves against the gradient: drop what would carry the value further outside
        grad = torch.where(value <= low, grad.clamp(max=0), torch.where(value >= high, grad.clamp(min=0), grad))
        return grad / unit, None, None, None, None, None


def _value(value: Tensor, start: Tensor | None, unit: Tensor, low: float, high: float, default: float) -> Tensor:
    within = value.nan_to_num(default, high, low).clamp(low, high)
    return within * unit if start is None else torch.addcmul(start, within, unit)


def relative(value: Tensor, start: Tensor | None, unit: Tensor, low: float, high: float, default: float) -> Tensor:
    """``start + unit * value``, with ``value`` clipped to ``[low, high]``; NaN counts as ``default``.

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
        low: the lower bound of ``value``.
        high: the upper bound.
        default: stands in for NaN.
    """
    if is_tracing():  # of which no gradient is asked, and which records operations, not functions
        return _value(value, start, unit, low, high, default)
    result: Tensor = _Relative.apply(value, start, unit, low, high, default)
    return result
