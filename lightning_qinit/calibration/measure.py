"""What a choice of step costs on its data, and what other initializers would have cost."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lightning_qinit.functional.affine import affine_error
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers import INITIALIZERS, Initial, initialize

COMPARED = ("minmax", "percentile", "lsq", "lsq+", "sawb", "aciq")
"""Initializers that every report compares with: those that look at the data once."""

_PART = 2**18  # values that a CPU measures at a time, so that all that is computed of them stays in its cache


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
    energy, clipped, count = 0.0, 0.0, 0.0
    errors: dict[str, float] = {}
    for part, initial in _in_parts(sample, chosen):
        energy += float(part.energy.sum())
        errors[""] = errors.get("", 0.0) + _error(part, levels, initial)
        data = part if initial.offset is None else part.shifted(initial.offset)
        weight = float(part.count.sum())
        clipped += weight * data.share_clipped(levels, initial.step)
        count += weight
        for name in COMPARED:
            try:
                other = initialize(INITIALIZERS[name], part, levels, initial.offset is not None)
            except ValueError:
                continue
            errors[name] = errors.get(name, 0.0) + _error(part, levels, other)
    relative = {name: error / energy if energy > 0 else 0.0 for name, error in errors.items()}
    return Measures(relative.pop(""), clipped / max(count, 1.0), relative, energy == 0)


def _error(sample: Sample, levels: Tensor, initial: Initial) -> float:
    return float(affine_error(sample, levels, initial.step, initial.offset).sum())


def _in_parts(sample: Sample, chosen: Initial) -> Iterator[tuple[Sample, Initial]]:
    """Some groups at a time, or all: on a GPU, and with an offset, for which rules look at all groups."""
    groups, length = sample.values.shape
    apart = sample.values.device.type == "cpu" and chosen.offset is None
    size = max(1, _PART // max(1, length)) if apart else max(1, groups)
    for first in range(0, groups, size):
        of = slice(first, first + size)
        part = Sample(sample.values[of], sample.weights[of], sample.minimum[of], sample.maximum[of])
        yield part, Initial(chosen.step[of], None if chosen.offset is None else chosen.offset[of])
