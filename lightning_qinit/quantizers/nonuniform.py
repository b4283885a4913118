"""Quantizers whose levels are any sorted set of numbers."""

from abc import abstractmethod

from torch import Tensor

from lightning_qinit.quantizers.base import Quantizer
from lightning_qinit.quantizers.straight_through import round_to_levels


class NonUniform(Quantizer):
    """Levels from a table, which a subclass gives by ``level_set``; the gradient is LSQ's, level by level.

    With ``v = x / s`` the gradient to ``x`` passes between the outer levels; the step receives ``level - v`` there
    and the outer level beyond. Its gradient scale makes the outermost point ``s c_max`` move as fast as the
    ``s Qp`` of LSQ does, ``Qp`` the number of positive levels: ``Qp^1.5 / (c_max^2 sqrt(N))``.
    """

    table: Tensor

    @abstractmethod
    def level_set(self, bits: int, signed: bool) -> Tensor:
        """The levels at step 1: sorted, 1-D, float64."""

    def _remember(self, calibrated: bool, signed: bool, bits: int) -> None:
        super()._remember(calibrated, signed, bits)
        levels = self.level_set(bits, signed)
        self.low, self.high, self.positive = float(levels[0]), float(levels[-1]), int((levels > 0).sum())
        self.register_buffer("table", levels.to(self.initial_step), persistent=False)

    def quantize(self, x: Tensor, scale: Tensor, elements: int) -> Tensor:
        """See the class."""
        table = self.table if x.dtype == self.table.dtype else self.levels.to(x)
        top = max(-self.low, self.high)
        gradient_scale = max(1, self.positive) ** 1.5 / top**2 * elements**-0.5
        return round_to_levels(x, scale, self.low, self.high, gradient_scale, table)
