"""LSQ: learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153)."""

from typing import Any

import torch
from torch import Tensor

from lightning_qinit.functional.levels import uniform_levels, uniform_range
from lightning_qinit.quantizers.base import Quantizer


class LSQ(Quantizer, name="lsq"):
    """Uniform levels ``-Qn .. Qp`` times a learned step ``s``.

    Forward (equations 1 and 2): ``s * round(clip(x / s, -Qn, Qp))``. Backward (equations 3 and 5), with
    ``v = x / s``: the gradient to ``x`` passes where ``-Qn < v < Qp``; the step receives ``round(v) - v`` there,
    ``-Qn`` where ``v <= -Qn`` and ``Qp`` where ``v >= Qp``, times the gradient scale ``1 / sqrt(N Qp)``
    (section 2.2), ``N`` the number of values that share the step: of the weights, or of one sample's features.

    Saturation is decided on ``v`` as in the paper. ``torch._fake_quantize_learnable_per_tensor_affine`` decides it
    on ``round(v)``, so within half a step beyond the outer levels the two gradients differ.
    """

    def level_set(self, bits: int, signed: bool) -> Tensor:
        """``-2^(b-1) .. 2^(b-1) - 1``, or ``0 .. 2^b - 1`` unsigned; one signed bit is ``-1, +1``."""
        return uniform_levels(bits, signed)

    def quantize(self, x: Tensor, scale: Tensor, elements: int) -> Tensor:
        """See the class."""
        low, high = uniform_range(self.n_bits, self.is_signed)
        result: Tensor = _LSQ.apply(x, scale, low, high, (elements * high) ** -0.5)
        return result


def _codes(v: Tensor, low: int, high: int) -> Tensor:
    if low == -1 and high == 1:  # one bit: no code 0
        return torch.where(v < 0, -1.0, 1.0).to(v.dtype)
    return v.clamp(low, high).round()


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.constants = (low, high, gradient_scale)
        return _codes(x / scale, low, high) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, scale = ctx.saved_tensors
        low, high, gradient_scale = ctx.constants
        v = x / scale
        inside = (v > low) & (v < high)
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * inside
        if ctx.needs_input_grad[1]:
            slope = _codes(v, low, high) - v * inside
            grad_scale = (grad * slope).sum_to_size(scale.shape) * gradient_scale
        return grad_x, grad_scale, None, None, None
