"""ACIQ: analytical clipping for integer quantization (Banner et al., NeurIPS 2019, arXiv 1810.05723)."""

import torch
from torch import Tensor

from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers.requirements import bits_of, require_uniform

# The clip of least expected error in standard deviations (Gauss) and in scales b (Laplace) by bits, 1 to 8, as in the
# authors' code; values of one sign have half the range and so the entry of one bit more.
GAUSS = (1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92, 4.20)
LAPLACE = (1.86, 2.83, 3.89, 5.03, 6.20, 7.41, 8.64, 9.89, 11.16)


def aciq_gauss(sample: Sample, levels: Tensor) -> Tensor:
    """The clip for a normal distribution of the sample's deviation.

    Values of one sign are taken for a rectified distribution around zero, of which they show one half.
    """
    require_uniform("aciq_gauss", levels)
    return _step(_spreads(sample, levels)[0], GAUSS, levels)


def aciq_laplace(sample: Sample, levels: Tensor) -> Tensor:
    """The clip for a Laplace distribution of the sample's mean absolute deviation; one sign as for ``aciq_gauss``."""
    require_uniform("aciq_laplace", levels)
    return _step(_spreads(sample, levels)[1], LAPLACE, levels)


def aciq(sample: Sample, levels: Tensor) -> Tensor:
    """Of both distributions, the one under which the data's moments are likelier; chosen for each group.

    The ratio ``mean|x| / sqrt(mean x^2)`` is 0.798 for a Gaussian and 0.707 for a Laplace distribution; the nearer
    one is taken. (The authors' code takes the distribution as an argument.)
    """
    require_uniform("aciq", levels)
    deviation, absolute = _spreads(sample, levels)
    ratio = absolute / torch.where(deviation > 0, deviation, 1.0)
    middle = ((2 / torch.pi) ** 0.5 + 0.5**0.5) / 2
    return torch.where(ratio > middle, _step(deviation, GAUSS, levels), _step(absolute, LAPLACE, levels))


def _spreads(sample: Sample, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Standard and mean absolute deviation of each group; of values of one sign, about zero."""
    if levels[0] < 0:
        x = sample.values - sample.mean(sample.values)[:, None]
        return sample.mean(x.square()).sqrt(), sample.mean(x.abs())
    # the half that is not seen
    return 2**0.5 * sample.root_mean_square, 2 * sample.magnitude


def _step(spread: Tensor, table: tuple[float, ...], levels: Tensor) -> Tensor:
    bits, one_sided = bits_of(levels), bool(levels[0] == 0)
    clip = spread * table[bits - 1 + one_sided]
    spacing = 2 * clip / 2**bits if not one_sided else clip / 2**bits
    return spacing / (levels[1] - levels[0]).to(clip)  # the two levels of one bit are two steps apart
