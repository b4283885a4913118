"""A quantizer and an initializer as a user writes them: outside the package, one class and one function."""

import torch
from torch import Tensor

from lightning_qinit import Quantizer, Sample


class MidRise(Quantizer):
    """Levels ``(k + 1/2) s``: none at zero. Unsigned ones start at ``s / 2``."""

    def __init__(self, *args, margin: float = 0.0, **state) -> None:
        super().__init__(*args, **state)
        self.margin = margin

    def level_set(self, bits: int, signed: bool) -> Tensor:
        if not signed:
            return torch.arange(2**bits, dtype=torch.float64)
        return torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2

    def quantize(self, x: Tensor, scale: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
        levels = self.levels
        low, high, shift = float(levels[0]), float(levels[-1]), 0.5 * self.is_signed
        v = (x / scale).clamp(low - self.margin, high + self.margin)
        code = ((v - shift).round() + shift).clamp(low, high)
        return ((v + (code - v).detach()) * scale).to(dtype)


def three_deviations(sample: Sample, levels: Tensor) -> Tensor:
    """The outermost level three deviations out."""
    return 3 * sample.deviation() / levels[-1].to(sample.values)
