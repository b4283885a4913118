"""A picture of one quantizer: its values with the levels drawn in, and the error against the step."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_qinit.functional.affine import affine_error
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers import INITIALIZERS, Initial, initialize
from lightning_qinit.monitoring.monitor import channels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS = 2.0 ** torch.linspace(-3, 3, 73, dtype=torch.float64)
SHOWN = ("minmax", "lsq", "lsq+", "aciq", "percentile")
MARKS = "ov^sD"
BINS = 120
MOST_VALUES = 2**16
MOST_LEVELS = 64  # more lines than that are a grey area


def enough(sample: Sample, chosen: Initial) -> tuple[Sample, Initial]:
    """Some of the groups and, of unweighted data, some of the values: enough to draw."""
    groups = channels(len(sample.values))  # on the CPU, as an index of either: steps may lie elsewhere than values
    stride = max(1, len(groups) * sample.values.shape[1] // MOST_VALUES)
    weighted = bool((sample.weights != sample.weights[:, :1]).any())  # the keys of a sketch
    kept = slice(None) if weighted else slice(None, None, stride)
    some = Sample.of_values(sample.values[groups][:, kept], sample.weights[groups][:, kept])
    return some, Initial(chosen.step[groups], None if chosen.offset is None else chosen.offset[groups])


def draw(name: str, sample: Sample, chosen: Initial, levels: Tensor) -> "Figure":
    """Draw a quantizer.

    Left: the values in units of each group's step, on a logarithmic scale of counts, with the levels as lines. Right:
    the relative squared error against the step, relative to the one chosen, and where other initializers would be.

    Args:
        name: the logged name.
        sample: the data, in groups.
        chosen: step (and offset) of each group.
        levels: the level set at step 1.

    Raises:
        ModuleNotFoundError: without Matplotlib.
    """
    from matplotlib.figure import Figure  # no pyplot: it would keep figures and may need a display

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _values(left, sample, levels, chosen)
    _errors(right, sample, levels, chosen)
    figure.suptitle(name)
    return figure


def _values(axes: Any, sample: Sample, levels: Tensor, chosen: Initial) -> None:
    offset = torch.zeros_like(chosen.step) if chosen.offset is None else chosen.offset
    v = ((sample.values - offset[:, None].to(sample.values)) / chosen.step[:, None].to(sample.values)).cpu()
    low, high = float(levels[0]), float(levels[-1])
    margin = (high - low) / 4
    edges = torch.linspace(low - margin, high + margin, BINS + 1, dtype=torch.float64)
    inside = v.clamp(edges[0], edges[-1])
    index = torch.bucketize(inside, edges[1:-1])
    heights = torch.bincount(index.flatten(), sample.weights.cpu().expand_as(v).flatten(), BINS)
    axes.stairs(heights.tolist(), edges.tolist(), fill=True, color="0.6")
    axes.set_yscale("log")
    if len(levels) <= MOST_LEVELS:
        for level in levels.tolist():
            axes.axvline(level, color="black", linewidth=1)
    else:
        axes.axvspan(low, high, color="0.9", zorder=0)
    axes.set_xlabel("value / step")
    axes.set_ylabel("values (ends: all beyond)")


def _errors(axes: Any, sample: Sample, levels: Tensor, chosen: Initial) -> None:
    energy = float(sample.energy.sum()) or 1.0

    def error(initial: Initial) -> float:
        return max(float(affine_error(sample, levels, initial.step, initial.offset).sum()) / energy, 1e-12)

    curve = [error(chosen._replace(step=chosen.step * factor)) for factor in FACTORS]
    axes.loglog(FACTORS.tolist(), curve, color="black", base=2)
    axes.set_yscale("log")
    axes.plot([1.0], [error(chosen)], "k*", markersize=12, label="chosen")
    for rule, mark in zip(SHOWN, MARKS, strict=True):
        try:
            other = initialize(INITIALIZERS[rule], sample, levels, chosen.offset is not None)
        except ValueError:  # the rule has no answer for these levels
            continue
        ratio = float((other.step / chosen.step.to(other.step)).log().mean().exp())
        axes.plot([ratio], [error(other)], mark, color="0.3", markerfacecolor="none", label=rule)
    axes.set_xlabel("step / chosen step")
    axes.set_ylabel("relative squared error")
    axes.legend(fontsize="small")
