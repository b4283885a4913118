"""Rounding to the nearest level, with the gradients of learned-step quantization."""

from typing import Any

import torch
from torch import Tensor


def round_to_levels(
    x: Tensor,
    scale: Tensor,
    low: float,
    high: float,
    gradient_scale: float,
    table: Tensor | None = None,
    learns_rounding: bool = True,
) -> Tensor:
    """``scale`` times the level nearest to ``v = x / scale``.

    Backward: the gradient to ``x`` passes where ``low < v < high``. The step receives, times ``gradient_scale``, the
    outer level where ``v`` lies on it or beyond, and ``level - v`` between (LSQ, equation 3).

    Args:
        x: the values.
        scale: the step, broadcasting against ``x``.
        low: the lowest level at step 1.
        high: the highest.
        gradient_scale: a factor on the step's gradient.
        table: the levels at step 1, 1-D and sorted, in the dtype of ``x``; ``None`` for the integers ``low .. high``.
        learns_rounding: whether the step receives ``level - v`` between the outer levels, or nothing (PACT).
    """
    result: Tensor = _RoundToLevels.apply(x, scale, low, high, gradient_scale, table, learns_rounding)
    return result


def binary_table(x: Tensor) -> Tensor:
    """The levels ``-1, 1``, which are no run of integers, like ``x``."""
    return torch.arange(-1, 2, 2, dtype=x.dtype, device=x.device)


def _nearest(v: Tensor, low: float, high: float, table: Tensor | None) -> Tensor:
    if table is not None:
        level = torch.empty_like(v)  # keeps the memory format, which the lookup does not
        level.copy_(table[torch.bucketize(v.contiguous(), (table[1:] + table[:-1]) / 2, right=True)])
        return torch.where(v == v, level, v)  # NaN stays NaN, as rounding leaves it
    return v.clamp(low, high).round()


class _RoundToLevels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        low: float,
        high: float,
        gradient_scale: float,
        table: Tensor | None,
        learns_rounding: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, table)
        ctx.constants = (low, high, gradient_scale, learns_rounding)
        return _nearest(x / scale, low, high, table) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, table = ctx.saved_tensors
        low, high, gradient_scale, learns_rounding = ctx.constants
        v = x / scale
        inside = (v > low) & (v < high)
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * inside
        if ctx.needs_input_grad[1]:
            level = _nearest(v, low, high, table)
            slope = level - v * inside if learns_rounding else level * ~inside
            grad_scale = (grad * slope).sum_to_size(scale.shape) * gradient_scale
        return grad_x, grad_scale, None, None, None, None, None
