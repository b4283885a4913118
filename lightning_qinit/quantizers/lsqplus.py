"""LSQ+: a learned step and, for activations, a learned offset (Bhalgat et al., CVPRW 2020, arXiv 2004.09576)."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qinit.functional.levels import uniform_levels
from lightning_qinit.functional.sharded import copy_whole, whole
from lightning_qinit.quantizers.base import MAX_DRIFT
from lightning_qinit.quantizers.lsq import LSQ
from lightning_qinit.quantizers.relative import relative


class LSQPlus(LSQ, name="lsq+"):
    """LSQ for weights; for inputs also an offset ``b``: ``s * round(clip((x - b) / s, 0, 2^b - 1)) + b``.

    For activations with a small negative tail (GELU, SiLU, Hardswish). Backward: as LSQ with ``v = (x - b) / s``;
    the offset receives 0 between the outer levels and 1 beyond (section 3.1), times LSQ's gradient scale. The codes
    of inputs are unsigned whatever the sign of the data, since the offset places them (configuration 4 of the paper).
    """

    relative_offset: nn.Parameter
    initial_offset: Tensor

    def __init__(self, *args: Any, **state: Any) -> None:
        super().__init__(*args, **state)
        if self.has_offset:
            # in units of the initial step, from the initial offset
            self.relative_offset = nn.Parameter(torch.zeros_like(self.initial_step))
            self.register_buffer("initial_offset", torch.zeros_like(self.initial_step))

    @property
    def has_offset(self) -> bool:  # type: ignore[override]  # a constant of most classes
        """Whether these are inputs."""
        return self.batch_axis is not None

    def reset_parameters(self) -> None:
        """Back to before calibration: step 1, offset 0, identity."""
        super().reset_parameters()
        if hasattr(self, "initial_offset"):
            with torch.no_grad():
                self.relative_offset.zero_()
                self.initial_offset.zero_()

    def level_set(self, bits: int, signed: bool) -> Tensor:
        """``0 .. 2^b - 1`` with an offset, else as LSQ."""
        return uniform_levels(bits, signed and not self.has_offset, self.narrow_range)

    @property
    def offset(self) -> Tensor | None:
        """The offset in use, ``(1,)``: within 2^16 initial steps of where it started; ``None`` for weights."""
        if not self.has_offset:
            return None
        return relative(
            whole(self.relative_offset), self.initial_offset, self.initial_step, -MAX_DRIFT, MAX_DRIFT, default=0.0
        )

    @torch.no_grad()
    def start(self, step: Tensor, bits: int, signed: bool, offset: Tensor | None = None) -> None:
        """As of :class:`Quantizer`; without an offset given it starts at 0."""
        if self.has_offset:
            offset = torch.zeros_like(step) if offset is None else offset
            self.initial_offset.copy_(offset.to(self.initial_offset).expand_as(self.initial_offset))
            copy_whole(self.relative_offset, torch.zeros_like(self.initial_offset))
            signed = False
        super().start(step, bits, signed)
