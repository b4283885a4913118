"""Weights that flip between two integers (Nagel et al., ICML 2022, arXiv 2203.11086)."""

import torch
from torch import Tensor


class Oscillation:
    """The rate at which each weight's integer flips back and forth, as an exponential average.

    An integer oscillates at a step if it changed, and changed in the other direction than at its last change
    (section 3.1, equation 5); ``rate`` is the exponential average of that (equation 6). Memory: 7 bytes per weight.

    Args:
        momentum: weight of the newest step.

    Attributes:
        rate: per weight, 0 to 1; ``None`` before the first update.
    """

    def __init__(self, momentum: float = 0.01) -> None:
        self.momentum = momentum
        self.rate: Tensor | None = None
        self._codes: Tensor | None = None
        self._direction: Tensor | None = None

    @torch.no_grad()
    def update(self, codes: Tensor) -> Tensor:
        """Take the integers of a step; returns which weights oscillated at it."""
        codes = codes.to(torch.int16)
        if self._codes is None or self._direction is None or self.rate is None:
            self._codes, self._direction = codes, torch.zeros_like(codes, dtype=torch.int8)
            self.rate = torch.zeros_like(codes, dtype=torch.float32)
            return torch.zeros_like(codes, dtype=torch.bool)
        direction = (codes - self._codes).sign().to(torch.int8)
        oscillates = direction * self._direction < 0
        self._codes = codes
        self._direction = torch.where(direction != 0, direction, self._direction)
        self.rate.lerp_(oscillates.to(self.rate), self.momentum)
        return oscillates
