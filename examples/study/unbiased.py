"""An initializer for weights that counts what a weight's errors do together, not only one by one.

An output of a layer is ``sum w a``; errors ``e`` of the weights change it by ``sum e a``, whose mean square is
``E[a^2] ((1 - rho) sum e^2 + rho (sum e)^2)`` for inputs that are alike and independent, with
``rho = E[a]^2 / E[a^2]``. The plain optimum takes ``rho`` for 0. After a ReLU, ``rho`` is ``1 / pi`` for a normal
distribution, and where levels are not symmetric (``-2 .. 1`` at 2 bits) the errors of the plain optimum have a mean,
which adds up over hundreds of inputs.
"""

import math

import torch
from torch import Tensor

from lightning_qinit.functional.sample import Sample
from lightning_qinit.functional.sweep import assign
from lightning_qinit.initializers.optimal import optimal

RHO = 1 / math.pi
CANDIDATES = torch.linspace(0.6, 2.0, 141, dtype=torch.float64)  # of the plain optimum


def unbiased(sample: Sample, levels: Tensor) -> Tensor:
    """The step of least mean square error of a layer's output, of 141 around the plain optimum."""
    x, levels = sample.values, levels.to(sample.values)
    start = optimal(sample, levels).step
    costs = []
    for ratio in CANDIDATES:
        step = (ratio * start)[:, None]
        error = levels[assign(x, step, levels)] * step - x
        costs.append((1 - RHO) * error.square().sum(1) + RHO * error.sum(1).square())
    return CANDIDATES[torch.stack(costs).argmin(0)].to(start) * start
