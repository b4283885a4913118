"""LSQ+: a learned step and, for activations, a learned offset (Bhalgat et al., CVPRW 2020, arXiv 2004.09576)."""

import torch
from torch import Tensor

from lightning_qinit.functional.levels import uniform_levels
from lightning_qinit.quantizers.lsq import LSQ


class LSQPlus(LSQ, name="lsq+"):
    """LSQ for weights; for inputs also an offset ``b``: ``s * round(clip((x - b) / s, 0, 2^b - 1)) + b``.

    For activations with a small negative tail (GELU, SiLU, Hardswish). Backward: as LSQ with ``v = (x - b) / s``;
    the offset receives 0 between the outer levels and 1 beyond (section 3.1), times LSQ's gradient scale. The codes
    of inputs are unsigned whatever the sign of the data, since the offset places them (configuration 4 of the paper).
    """

    @property
    def has_offset(self) -> bool:  # type: ignore[override]  # a constant of most classes
        """Whether these are inputs."""
        return self.batch_axis is not None

    def level_set(self, bits: int, signed: bool) -> Tensor:
        """``0 .. 2^b - 1`` with an offset, else as LSQ."""
        return uniform_levels(bits, signed and not self.has_offset, self.narrow_range)

    @torch.no_grad()
    def start(self, step: Tensor, bits: int, signed: bool, offset: Tensor | None = None) -> None:
        """As of :class:`Quantizer`; the codes are unsigned where there is an offset."""
        super().start(step, bits, signed and not self.has_offset, offset)
