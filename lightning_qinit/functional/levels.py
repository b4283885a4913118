"""Level sets: the values a quantizer can take at step 1."""

import torch
from torch import Tensor

from lightning_qinit.checks import check, check_whole, is_whole


def uniform_range(bits: int, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """The lowest and the highest integer code of a uniform quantizer of ``bits`` bits.

    Signed codes use the full range ``-2^(b-1) .. 2^(b-1) - 1`` (LSQ, Esser et al. 2020, section 2) or, narrow, the
    symmetric ``-(2^(b-1) - 1) .. 2^(b-1) - 1``; unsigned codes are ``0 .. 2^b - 1``. One signed bit is the pair
    ``-1, +1``, since one bit would hold no positive value.

    Raises:
        ValueError: if ``bits`` is not a whole number of at least 1.
    """
    check_whole("bits", bits, 1)
    if not signed:
        return 0, 2**bits - 1
    high = max(1, 2 ** (bits - 1) - 1)
    return (-high if narrow or bits == 1 else -high - 1), high


def uniform_levels(bits: int, signed: bool, narrow: bool = False) -> Tensor:
    """The levels of a uniform quantizer, sorted, as a 1-D float64 tensor (see :func:`uniform_range`)."""
    low, high = uniform_range(bits, signed, narrow)
    return torch.arange(low, high + 1, 2 if signed and bits == 1 else 1, dtype=torch.float64, device="cpu")


def apot_levels(bits: int, signed: bool) -> Tensor:
    """Additive powers of two (Li et al., ICLR 2020, section 2.2), scaled to a greatest level of 1; sorted, float64.

    A magnitude of ``m`` bits is a sum of ``m // 2`` terms, each 0 or one of three powers of two, and for odd ``m`` of
    one more, which is 0 or a single power; all powers are different, so that there are ``2^m`` magnitudes. Signed
    levels spend one bit on the sign: ``2^b - 1`` levels, symmetric; with 2 bits they are ternary.

    Args:
        bits: 2 to 8. (The paper and its code go to 6 bits; the rule is the same beyond.)
        signed: whether one of the bits is a sign.

    Raises:
        ValueError: for other bits.
    """
    check("bits", bits, is_whole(bits) and 2 <= bits <= 8, "a whole number from 2 to 8")
    magnitude_bits = bits - 1 if signed else bits
    pairs, odd = divmod(magnitude_bits, 2)
    exponents = [[i * pairs + j + 1 for i in range(2)] for j in range(pairs)]
    single = [[2 * pairs + 1]] if odd else []
    exponents = [[*term, 2 * pairs + odd + j + 1] for j, term in enumerate(exponents)] + single
    magnitudes = torch.zeros(1, dtype=torch.float64, device="cpu")
    for term in exponents:
        choices = torch.tensor([0.0, *(2.0**-e for e in term)], dtype=torch.float64, device="cpu")
        magnitudes = (magnitudes[:, None] + choices).flatten()
    magnitudes = magnitudes.sort().values / magnitudes.max()
    return torch.cat((-magnitudes[1:].flip(0), magnitudes)) if signed else magnitudes


def check_levels(levels: Tensor) -> Tensor:
    """Return ``levels`` as float64, or raise ``ValueError`` if they are not a level set.

    A level set is a 1-D tensor of at least two finite values in strictly increasing order that holds 0 or has
    values on both sides of it (else a smaller step is always better for values of the other sign, and there is
    no optimum).
    """
    if not isinstance(levels, Tensor):
        levels = torch.tensor(levels, device="cpu")
    levels = levels.detach().to(torch.float64)
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


def is_run(levels: Tensor) -> bool:
    """Whether the levels are consecutive integers."""
    values = levels.double().tolist()
    return values[0].is_integer() and values == [values[0] + i for i in range(len(values))]


def is_uniform(levels: Tensor) -> bool:
    """Whether the levels are consecutive integers, or the pair ``-1, 1``."""
    return is_run(levels) or levels.tolist() == [-1, 1]
