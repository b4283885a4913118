"""LSQ: learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153)."""

from typing import Any

from torch import Tensor

from lightning_qinit.functional.levels import uniform_levels, uniform_range
from lightning_qinit.quantizers.base import Quantizer
from lightning_qinit.quantizers.straight_through import binary_table, round_to_levels


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
        super().__init__(*args, **state)
        self.narrow_range = narrow_range

    def level_set(self, bits: int, signed: bool) -> Tensor:
        """``-2^(b-1) .. 2^(b-1) - 1``, or ``0 .. 2^b - 1`` unsigned; one signed bit is ``-1, +1``."""
        return uniform_levels(bits, signed, self.narrow_range)

    def quantize(self, x: Tensor, scale: Tensor, elements: int) -> Tensor:
        """See the class."""
        _, high = self.code_range
        return self.round(x, scale, gradient_scale=(elements * high) ** -0.5)

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest integer."""
        return uniform_range(self.n_bits, self.is_signed, self.narrow_range)

    def round(self, x: Tensor, scale: Tensor, gradient_scale: float, learns_rounding: bool = True) -> Tensor:
        """Round to the integers, with a gradient to the step as ``round_to_levels`` has it."""
        binary = binary_table(x) if self.n_bits == 1 and self.is_signed else None
        return round_to_levels(x, scale, *self.code_range, gradient_scale, binary, learns_rounding)
