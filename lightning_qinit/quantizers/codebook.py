"""Levels that the user gives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_qinit.functional.levels import check_levels
from lightning_qinit.quantizers.base import Quantizer


class Codebook(Quantizer, name="codebook"):
    """A fixed set of levels times a learned step.

    Args:
        levels: the levels at step 1, in increasing order, on both sides of zero or with zero among them; used as they
            are for weights and for inputs of either sign.
        **state: as of :class:`~lightning_qinit.Quantizer`. The number of bits must be the least that can number the
            levels, so that what is reported is true.
    """

    def __init__(self, *args: Any, levels: Sequence[float], **state: Any) -> None:
        self._codebook = tuple(float(level) for level in levels)
        super().__init__(*args, **state)

    def level_set(self, bits: int, signed: bool) -> Tensor:
        """The levels given."""
        levels = check_levels(torch.tensor(self._codebook, dtype=torch.float64, device="cpu"))
        needed = (len(levels) - 1).bit_length()
        if bits != needed:
            raise ValueError(f"a codebook of {len(levels)} levels has {needed} bits, got {bits}.")
        return levels
