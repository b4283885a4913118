"""LSQ: learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153)."""

from typing import Any

from torch import Tensor

from lightning_qinit.functional.levels import uniform_levels
from lightning_qinit.quantizers.base import Quantizer


class LSQ(Quantizer, name="lsq"):
    """Uniform levels ``-Qn .. Qp`` times a learned step ``s``.

    Forward (equations 1 and 2): ``s * round(clip(x / s, -Qn, Qp))``. Backward (equations 3 and 5), with
    ``v = x / s``: the gradient to ``x`` passes where ``-Qn < v < Qp``; the step receives ``round(v) - v`` there,
    ``-Qn`` where ``v <= -Qn`` and ``Qp`` where ``v >= Qp``, times the gradient scale ``1 / sqrt(N Qp)``
    (section 2.2), ``N`` the number of values that share the step: of the weights, or of one sample's features.

    Saturation is decided on ``v`` as in the paper. ``torch._fake_quantize_learnable_per_tensor_affine`` decides it
    on ``round(v)``, so within half a step beyond the outer levels the two gradients differ.

    Args:
        narrow_range: signed levels ``-Qp .. Qp`` instead of ``-Qp - 1 .. Qp``; with 2 bits they are ternary.
        **state: as of :class:`Quantizer`.
    """

    def __init__(self, *args: Any, narrow_range: bool = False, **state: Any) -> None:
        self.narrow_range = narrow_range
        super().__init__(*args, **state)

    def level_set(self, bits: int, signed: bool) -> Tensor:
        """``-2^(b-1) .. 2^(b-1) - 1``, or ``0 .. 2^b - 1`` unsigned; one signed bit is ``-1, +1``."""
        return uniform_levels(bits, signed, self.narrow_range)

    def gradient_scale(self, elements: int) -> float:
        """``1 / sqrt(N Qp)``."""
        return (elements * self.high) ** -0.5
