"""Initializers: a sample and a level set give the step to start from.

An initializer is a function ``(sample, levels) -> step``: a :class:`~lightning_qinit.functional.sample.Sample` in
groups, the sorted level set of the quantizer at step 1, and a float64 step per group, ``(groups,)``. A step that
comes out zero or not finite (a group without a nonzero value) is replaced by the caller, see
:func:`usable`. To add one, write the function and name it in ``INITIALIZERS``; functions outside the package are
given by themselves, or by their import path in YAML.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers.lsq import lsq as lsq
from lightning_qinit.initializers.minmax import minmax as minmax
from lightning_qinit.initializers.optimal import optimal as optimal

Initializer = Callable[[Sample, Tensor], Tensor]

INITIALIZERS: dict[str, Initializer] = {function.__name__: function for function in (optimal, lsq, minmax)}


def usable(step: Tensor, sample: Sample) -> Tensor:
    """Give every group a positive, finite step, whatever its data.

    A group that has no nonzero value (an all-zero channel), or for which the initializer gave a step that is zero,
    negative or not finite, takes the largest step of the other groups; 1 if there is none.
    """
    good = step.isfinite() & (step > 0) & (sample.energy > 0)
    fallback = step[good].max() if good.any() else torch.ones_like(step[0])
    return torch.where(good, step, fallback)
