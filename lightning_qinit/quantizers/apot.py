"""APoT: additive powers-of-two quantization (Li, Dong and Wang, ICLR 2020, arXiv 1909.13144)."""

from typing import Any

import torch
from torch import Tensor

from lightning_qinit.functional.levels import apot_levels
from lightning_qinit.quantizers.base import Quantizer


class APoT(Quantizer, name="apot"):
    """Levels that are sums of powers of two, denser near zero, times a learned clipping scale (the step).

    The greatest level is 1, so the step is the paper's ``alpha``. Backward (section 2.3): ``alpha`` receives the sign
    of values beyond it and ``level - v`` between; the gradient to the values passes inside.

    Args:
        normalize: normalize weights to mean 0 and standard deviation 1 on every forward before they are quantized
            (section 2.4, equation 9), gradients included. The paper does not scale back, so a BatchNorm must follow
            the layer, and its statistics change at once: re-estimate them (``recalibrate_batchnorm``). Without it the
            quantizer works in any layer. Inputs are never normalized.
        **state: as of :class:`~lightning_qinit.Quantizer`; 2 to 8 bits.
    """

    def __init__(self, *args: Any, normalize: bool = False, **state: Any) -> None:
        super().__init__(*args, **state)
        self.normalize = normalize and self.batch_axis is None

    def level_set(self, bits: int, signed: bool) -> Tensor:
        """See :func:`~lightning_qinit.functional.levels.apot_levels`."""
        if bits < 2:
            raise ValueError(f"APoT has levels for 2 to 8 bits, got {bits}.")
        return apot_levels(bits, signed)

    def transform(self, x: Tensor) -> Tensor:
        """The normalized weight, or ``x``."""
        if not self.normalize:
            return x
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = x - x.mean()
        return centred / centred.square().mean().clamp(min=1e-30).sqrt()  # a constant weight becomes 0
