"""Initializers: a sample and a level set give the step to start from.

An initializer is a function ``(sample, levels) -> step``: a :class:`~lightning_qinit.functional.sample.Sample` in
groups, the sorted level set of the quantizer at step 1, and a float64 step per group, ``(groups,)``; or an
:class:`Initial`, which adds a note for the report. It raises ``ValueError`` if it has no answer for such levels. To add
one, write the function and name it in ``INITIALIZERS``; functions outside the package are given by themselves, or by
their import path in YAML.

What each needs, and which quantizers it has an answer for ("with offset": chooses that too):

| initializer | needs | lsq | lsq+ | apot | pact | codebook | source |
|---|---|---|---|---|---|---|---|
| `optimal` | the data | yes | with offset | yes | yes | yes | this package |
| `minmax` | extremes | yes | with offset | yes | yes | yes | the least step that clips nothing |
| `percentile` | quantiles | yes | with offset | yes | yes | yes | 99.9 % of the magnitudes |
| `mse_grid` | the data | yes | yes | yes | yes | yes | 100 candidates, as MQBench and BRECQ search |
| `constant` | deviation | yes | yes | yes | yes | yes | the code of Li et al. (APoT) |
| `lsq` | mean magnitude | yes | yes | no | yes | no | Esser et al., section 2.1 |
| `lsq+` | mean, deviation; extremes | yes | with offset | no | yes | no | Bhalgat et al., section 3.2 |
| `aciq`, `aciq_gauss`, `aciq_laplace` | first moments | yes | yes | no | yes | no | Banner et al., arXiv 1810.05723 |
| `sawb` | mean magnitude and square | signed | signed | no | signed | no | Choi et al., 2018, arXiv 1807.06964 |
| `kl` | a histogram | 4 bits and up | 4 bits and up | no | 4 bits and up | no | TensorRT's entropy calibration |

For quantizers with an offset, ``AFFINE`` names the functions that choose it together with the step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers.aciq import aciq, aciq_gauss, aciq_laplace
from lightning_qinit.initializers.constant import constant
from lightning_qinit.initializers.initial import Initial as Initial
from lightning_qinit.initializers.initial import usable as usable
from lightning_qinit.initializers.lsq import lsq, lsqplus, lsqplus_affine
from lightning_qinit.initializers.minmax import minmax, minmax_affine, percentile, percentile_affine
from lightning_qinit.initializers.optimal import optimal, optimal_affine
from lightning_qinit.initializers.sawb import sawb
from lightning_qinit.initializers.search import kl, mse_grid

Initializer = Callable[[Sample, Tensor], Tensor | Initial]

INITIALIZERS: dict[str, Initializer] = {
    "optimal": optimal,
    "minmax": minmax,
    "percentile": percentile,
    "lsq": lsq,
    "lsq+": lsqplus,
    "sawb": sawb,
    "aciq": aciq,
    "aciq_gauss": aciq_gauss,
    "aciq_laplace": aciq_laplace,
    "kl": kl,
    "mse_grid": mse_grid,
    "constant": constant,
}

AFFINE: dict[Initializer, Callable[[Sample, Tensor], Initial]] = {
    optimal: optimal_affine,
    minmax: minmax_affine,
    percentile: percentile_affine,
    lsqplus: lsqplus_affine,
}


def _answered(chosen: Tensor | Initial, sample: Sample, levels: Tensor, other: Initializer) -> Initial:
    """Where a rule gives no step though there is data (a quantile of sparse data, a range of one value), another's."""
    initial = Initial.of(chosen)
    for what, value in (("step", initial.step), ("offset", initial.offset)):
        if value is not None and not (isinstance(value, Tensor) and value.shape == sample.minimum.shape):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(
                f"An initializer must return the {what} as a tensor with one for each group, shape "
                f"{tuple(sample.minimum.shape)}, got {got}."
            )
    missing = ~(initial.step.isfinite() & (initial.step > 0)) & (sample.energy > 0)
    if not missing.any():
        return initial
    second = Initial.of(other(sample, levels))
    step = torch.where(missing, second.step, initial.step)
    offset = initial.offset
    if offset is not None and second.offset is not None:
        offset = torch.where(missing, second.offset, offset)
    note = f"the rule gives no step for {int(missing.sum())} of {len(step)} groups, which take another's"
    return Initial(step, offset, initial.note).noted(note)


def initialize(
    initializer: Initializer, sample: Sample, levels: Tensor, has_offset: bool = False, fallback: float = 1.0
) -> Initial:
    """Let an initializer choose, and make its choice fit for use (:func:`usable`).

    A group with data for which it gives no step takes that of ``minmax``, or of ``optimal`` with an offset.

    A rule without an offset of its own chooses the step for signed levels around zero if the data are signed, and the
    offset is where the lowest of them lies.
    """
    if not has_offset:
        return usable(_answered(initializer(sample, levels), sample, levels, minmax), sample, fallback)
    if initializer in AFFINE:
        chosen = AFFINE[initializer](sample, levels)
        return usable(_answered(chosen, sample, levels, optimal_affine), sample, fallback)
    zero_point = float(levels[(len(levels) + 1) // 2]) if bool((sample.minimum < 0).any()) else 0.0
    moved = levels - zero_point
    chosen = usable(_answered(initializer(sample, moved), sample, moved, minmax), sample, fallback)
    return chosen._replace(offset=-zero_point * chosen.step if zero_point else torch.zeros_like(chosen.step))
