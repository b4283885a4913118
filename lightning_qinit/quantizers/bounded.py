"""Steps that stay positive and finite under any learning rate, with LSQ's own gradient."""

from typing import Any

import torch
from torch import Tensor


class _BoundedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Tensor, initial: Tensor, drift: float) -> Tensor:
        ctx.save_for_backward(step, initial)
        ctx.drift = drift
        return torch.where(step.isnan(), initial, step).clamp(initial / drift, initial * drift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        step, initial = ctx.saved_tensors
        # gradient descent moves against the gradient: drop what would carry the step further outside
        outwards = ((step <= initial / ctx.drift) & (grad > 0)) | ((step >= initial * ctx.drift) & (grad < 0))
        return torch.where(outwards, 0.0, grad), None, None


def bounded_step(step: Tensor, initial: Tensor, drift: float) -> Tensor:
    """``step`` clipped to ``[initial / drift, initial * drift]``; NaN counts as ``initial``.

    Inside the bounds this is the identity, and so is its gradient: what trains is exactly LSQ. At a bound the
    gradient is projected, as projected gradient descent does: a component that leads back inside passes
    unchanged, one that leads further out is dropped, so the parameter is never stuck outside. Softplus or a
    logarithm would keep a step positive too, but rescale its gradient everywhere.

    Args:
        step: the parameter, any shape.
        initial: where it started, positive and finite, same shape.
        drift: a factor above 1.
    """
    result: Tensor = _BoundedStep.apply(step, initial, drift)
    return result
