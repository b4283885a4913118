"""PACT: parameterized clipping activation (Choi et al., 2018, arXiv 1805.06085)."""

from lightning_qinit.quantizers.lsq import LSQ


class PACT(LSQ, name="pact"):
    """LSQ's levels, with a clip ``a = s Qp`` that learns from clipped values alone.

    Forward: ``s * round(clip(x / s, -Qn, Qp))``, equation 2 for unsigned values. Backward (equation 3): ``a``
    receives 1 where ``x >= a`` and nothing elsewhere (for signed values, its counterpart on the other side). The
    parameter is the step, ``a / Qp``; its gradient is divided by ``Qp^2``, so that gradient descent moves ``a`` exactly
    as in the paper, which has no gradient scale. (Its weight decay of ``a`` is left out, as for all steps.)
    """

    learns_rounding = False

    def gradient_scale(self, elements: int) -> float:
        """``1 / Qp^2``."""
        return self.high**-2
