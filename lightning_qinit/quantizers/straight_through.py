"""Rounding to the nearest level, with the gradients of learned-step quantization."""

from typing import Any

import torch
from torch import Tensor

from lightning_qinit.quantizers.kernels import is_tracing
from lightning_qinit.quantizers.rounding import Rounding, gradients, rounded


def round_to_levels(x: Tensor, how: Rounding) -> Tensor:
    """``scale * level + offset`` with the level nearest to ``(x - offset) / scale``.

    Nothing but ``x`` is kept for the backward pass; see :func:`~lightning_qinit.quantizers.rounding.gradients`.

    Args:
        x: the values.
        how: the rounding.
    """
    if is_tracing():  # as in `relative`
        return rounded(x, how)
    result: Tensor = RoundToLevels.apply(x, how.scale, how.offset, how)
    return result


class RoundToLevels(torch.autograd.Function):
    """See :func:`round_to_levels`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, how: Rounding) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.how = how
        return rounded(x, how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset = ctx.saved_tensors
        return *gradients(grad, x, ctx.how._replace(scale=scale, offset=offset)), None
