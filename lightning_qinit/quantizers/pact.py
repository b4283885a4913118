"""PACT: parameterized clipping activation (Choi et al., 2018, arXiv 1805.06085)."""

from torch import Tensor

from lightning_qinit.quantizers.lsq import LSQ


class PACT(LSQ, name="pact"):
    """LSQ's levels, with a clip ``a = s Qp`` that learns from clipped values alone.

    Forward: ``s * round(clip(x / s, -Qn, Qp))``, equation 2 for unsigned values. Backward (equation 3): ``a``
    receives 1 where ``x >= a`` and nothing elsewhere (for signed values, its counterpart on the other side). The
    parameter is the step, ``a / Qp``; its gradient is divided by ``Qp^2``, so that gradient descent and weight decay
    move ``a`` exactly as they do in the paper, which has no gradient scale.
    """

    def quantize(self, x: Tensor, scale: Tensor, elements: int) -> Tensor:
        """See the class."""
        _, high = self.code_range
        return self.round(x, scale, gradient_scale=high**-2.0, learns_rounding=False)
