"""Level sets: the values a quantizer can take at step 1."""

import torch
from torch import Tensor


def uniform_range(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and the highest integer code of a uniform quantizer of ``bits`` bits.

    Signed codes use the full range ``-2^(b-1) .. 2^(b-1) - 1`` (LSQ, Esser et al. 2020, section 2), unsigned
    codes ``0 .. 2^b - 1``. One signed bit is the pair ``-1, +1``, since a full range of one bit would hold no
    positive value.
    """
    if not signed:
        return 0, 2**bits - 1
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def uniform_levels(bits: int, signed: bool) -> Tensor:
    """The levels of a uniform quantizer, sorted, as a 1-D float64 tensor (see :func:`uniform_range`)."""
    low, high = uniform_range(bits, signed)
    return torch.arange(low, high + 1, 2 if signed and bits == 1 else 1, dtype=torch.float64)


def check_levels(levels: Tensor) -> Tensor:
    """Return ``levels`` as float64, or raise ``ValueError`` if they are not a level set.

    A level set is a 1-D tensor of at least two finite values in strictly increasing order that holds 0 or has
    values on both sides of it (else a smaller step is always better for values of the other sign, and there is
    no optimum).
    """
    levels = torch.as_tensor(levels).detach().to(torch.float64)
    if levels.dim() != 1 or len(levels) < 2 or not levels.isfinite().all() or not (levels.diff() > 0).all():
        raise ValueError(
            "`levels` must be a 1-D tensor of at least two finite values in strictly increasing order, "
            f"got shape {tuple(levels.shape)} with values {levels.flatten()[:8].tolist()}."
        )
    if levels[0] > 0 or levels[-1] < 0:
        raise ValueError(f"`levels` must hold 0 or lie on both sides of it, got {levels[:8].tolist()}.")
    return levels


def thresholds(levels: Tensor) -> Tensor:
    """The decision thresholds at step 1: the midpoints between neighbouring levels."""
    return (levels[1:] + levels[:-1]) / 2
