"""SAWB: statistics-aware weight binning (Choi et al., 2018, arXiv 1807.06964; MLSys 2019)."""

import torch
from torch import Tensor

from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers.requirements import bits_of, require, require_uniform

# (c1, c2) by bits, as published in IBM's fms-model-optimizer: a fit of the optimal clip over six distributions.
# On 2^b levels without a zero, whose step is 2 clip / (2^b - 1):
HALF_STEP_LEVELS = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.68, 12.80), 5: (17.74, 18.64)}
# on the 2^b - 1 levels of the narrow range, whose step is clip / Qp:
NARROW_LEVELS = {2: (2.6, 1.71), 4: (12.035, 12.03), 7: (28.24, 30.81), 8: (31.76, 35.04)}


def sawb(sample: Sample, levels: Tensor) -> Tensor:
    """The clip ``c1 sqrt(mean x^2) - c2 mean|x|``, from which the step follows; the range where that is not positive.

    For signed values. In narrow range for 2, 4, 7 and 8 bits. The full range has no coefficients of its own: it takes
    those of the levels without a zero, which have as many levels (2 to 5 bits), and those of the narrow range, which
    has hardly fewer, for 7 and 8.
    """
    require_uniform("sawb", levels)
    require(bool(levels[0] < 0), "sawb", "signed levels, since it is a rule for weights", levels)
    bits = bits_of(levels)
    narrow = bool(levels[0] == -levels[-1]) and len(levels) % 2 == 1
    table = NARROW_LEVELS if narrow or bits >= 7 else HALF_STEP_LEVELS
    known = "2, 4, 7 or 8 bits in narrow range" if narrow else "2 to 5, 7 or 8 bits in full range"
    require(bits in table, "sawb", known, levels)
    c1, c2 = table[bits]
    clip = c1 * sample.root_mean_square - c2 * sample.magnitude
    clip = torch.where(clip > 0, clip, torch.maximum(sample.maximum, -sample.minimum))
    return clip / levels[-1].to(clip) if table is NARROW_LEVELS else 2 * clip / (2**bits - 1)
