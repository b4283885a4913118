"""What a choice of step costs on its data, and what other initializers would have cost."""

from dataclasses import dataclass

from torch import Tensor

from lightning_qinit.functional.affine import affine_error
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers import INITIALIZERS, Initial, initialize

COMPARED = ("minmax", "percentile", "lsq", "lsq+", "sawb", "aciq")
"""Initializers that every report compares with: those that look at the data once."""


@dataclass(frozen=True)
class Measures:
    """Numbers about a quantizer at its start.

    Attributes:
        error: relative squared error on the data.
        clipped: share of values more than half a step beyond the outermost points.
        alternatives: the relative squared error that other initializers would have had; a rule that has no answer for
            the levels is missing.
        blind: whether the data say nothing of a step: there is none, or all of it is zero.
    """

    error: float
    clipped: float
    alternatives: dict[str, float]
    blind: bool


def measure(sample: Sample, levels: Tensor, chosen: Initial) -> Measures:
    """Measure a choice on the data that it was made for."""
    energy = float(sample.energy.sum())

    def relative(initial: Initial) -> float:
        error = float(affine_error(sample, levels, initial.step, initial.offset).sum())
        return error / energy if energy > 0 else 0.0

    alternatives = {}
    for name in COMPARED:
        try:
            other = initialize(INITIALIZERS[name], sample, levels, chosen.offset is not None)
        except ValueError:
            continue
        alternatives[name] = relative(other)
    data = sample if chosen.offset is None else sample.shifted(chosen.offset)
    return Measures(relative(chosen), data.share_clipped(levels, chosen.step), alternatives, energy == 0)
