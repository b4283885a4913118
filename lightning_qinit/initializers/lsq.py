"""The statistics of LSQ and LSQ+."""

import torch
from torch import Tensor

from lightning_qinit.functional.affine import refine, refine_scale
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers.initial import Initial
from lightning_qinit.initializers.minmax import minmax, minmax_affine
from lightning_qinit.initializers.requirements import bits_of, require, require_uniform


def lsq(sample: Sample, levels: Tensor) -> Tensor:
    """``2 mean|x| / sqrt(Qp)``, with ``Qp`` the greatest level (Esser et al., ICLR 2020, section 2.1)."""
    require_uniform("lsq", levels)
    return 2 * sample.magnitude / levels.max().to(sample.values).sqrt()


def lsqplus(sample: Sample, levels: Tensor) -> Tensor:
    """LSQ+'s rule for weights, ``max|mean +- 3 deviation| / 2^(b-1)`` (Bhalgat et al., 2020, section 3.2.1).

    For one-sided levels, where the paper has no closed form, its rule for activations with an offset of zero: a local
    minimum of the squared error, reached from the range of the data.
    """
    require_uniform("lsq+", levels)
    if levels[0] < 0:
        mean, deviation = sample.mean(sample.values), sample.deviation()
        reach = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
        return reach / 2.0 ** (bits_of(levels) - 1)
    return refine_scale(sample, levels, minmax(sample, levels))


def lsqplus_affine(sample: Sample, levels: Tensor) -> Initial:
    """LSQ+'s rule for activations (section 3.2.2): step and offset of least squared error, from the data's range.

    The paper descends by gradient; here codes and the regression on them alternate, which lowers the same error at
    every turn and ends in a local minimum too.
    """
    require(bool(levels[0] == 0), "lsq+ with an offset", "levels from 0 up", levels)
    start = minmax_affine(sample, levels)
    assert start.offset is not None
    return Initial(*refine(sample, levels, start.step, start.offset))
