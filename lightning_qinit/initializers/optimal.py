"""Least squared quantization error."""

from torch import Tensor

from lightning_qinit.functional.levels import check_levels
from lightning_qinit.functional.optimal import solve_rows
from lightning_qinit.functional.sample import Sample


def optimal(sample: Sample, levels: Tensor) -> Tensor:
    """The step of least squared error, for any level set (see ``lightning_qinit.functional.optimal_scale``).

    Exact on the data of a tensor. On a sketch, exact for the values kept; the tests hold its error on the data to
    within 1e-4 of the optimum up to 5 bits and 1e-3 up to 8 bits, on every kind of data they know.
    """
    return solve_rows(sample.values, sample.weights, check_levels(levels).to(sample.values.device)).scale
