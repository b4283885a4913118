"""Initializers: a sample and a level set give the step to start from.

An initializer is a function ``(sample, levels) -> step``: a :class:`~lightning_qinit.functional.sample.Sample` in
groups, the sorted level set of the quantizer at step 1, and a float64 step per group, ``(groups,)``; or an
:class:`Initial`, which adds a note for the report. To add one, write the function and name it in ``INITIALIZERS``;
functions outside the package are given by themselves, or by their import path in YAML.
"""

from collections.abc import Callable

from torch import Tensor

from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers.initial import Initial as Initial
from lightning_qinit.initializers.initial import usable as usable
from lightning_qinit.initializers.lsq import lsq as lsq
from lightning_qinit.initializers.minmax import minmax as minmax
from lightning_qinit.initializers.optimal import optimal as optimal

Initializer = Callable[[Sample, Tensor], Tensor | Initial]

INITIALIZERS: dict[str, Initializer] = {function.__name__: function for function in (optimal, lsq, minmax)}
