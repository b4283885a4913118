"""Parameters that stay within bounds under any learning rate, with their own gradient."""

from typing import Any

import torch
from torch import Tensor


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, initial: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(value, low, high)
        return torch.where(value.isnan(), initial, value).clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, low, high = ctx.saved_tensors
        # gradient descent moves against the gradient: drop what would carry the value further outside
        outwards = ((value <= low) & (grad > 0)) | ((value >= high) & (grad < 0))
        return torch.where(outwards, 0.0, grad), None, None, None


def bounded(value: Tensor, initial: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``value`` clipped to ``[low, high]``; NaN counts as ``initial``.

    Inside the bounds this is the identity, and so is its gradient: what trains is exactly the published method. At a
    bound the gradient is projected, as projected gradient descent does: a component that leads back inside passes
    unchanged, one that leads further out is dropped, so the parameter is never stuck outside. Softplus or a
    logarithm would keep a step positive too, but rescale its gradient everywhere.

    Args:
        value: the parameter, any shape.
        initial: where it started, same shape.
        low: the lower bound, same shape.
        high: the upper bound, same shape.
    """
    result: Tensor = _Bounded.apply(value, initial, low, high)
    return result
