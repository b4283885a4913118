"""The plots of the study: readable in black and white, by line style and marker."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from compare import Row, pooled, stressed
from measures import MEASURES, TARGET
from tables import BASE, OTHERS, QUANTIZERS, main_cells

LINES = {
    "optimal": {"color": "black", "lw": 2.4, "ls": "-"},
    "output": {"color": "black", "lw": 2.4, "ls": (0, (1, 1))},
    "lsq": {"color": "black", "lw": 1.1, "ls": "--"},
    "lsq+": {"color": "black", "lw": 1.1, "ls": "-."},
    "minmax": {"color": "0.45", "lw": 1.3, "ls": ":"},
    "percentile": {"color": "0.45", "lw": 1.1, "ls": "--"},
    "aciq": {"color": "0.45", "lw": 1.1, "ls": "-."},
    "sawb": {"color": "0.65", "lw": 1.1, "ls": "-"},
    "constant": {"color": "0.65", "lw": 1.3, "ls": ":"},
}
MARKERS = {
    "output": "*",
    "lsq": "s",
    "lsq+": "D",
    "minmax": "v",
    "percentile": "^",
    "aciq": "o",
    "sawb": "x",
    "constant": "+",
}


def curves(rows: Sequence[Row], path: Path) -> None:
    """The score while training with 2 bits, LSQ's quantizer, the mean over seeds: one panel for each task."""
    found = [c for c in main_cells(rows) if c.setting["quantizer"] == "lsq" and c.setting["bits"] == 2]
    figure, axes = plt.subplots(-(-len(found) // 3), 3, figsize=(9, 2.5 * -(-len(found) // 3) + 0.6), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, cell in zip(axes.flat, found, strict=False):
        settled = []
        for name, style in LINES.items():
            records = list(cell.runs.get(name, {}).values())
            if records:
                steps = [step for step, _ in records[0]["scores"]]
                means = [fmean(r["scores"][k][1] for r in records) for k in range(len(steps))]
                axis.plot(steps, means, label=name, zorder=3 if name == BASE else 2, **style)
                settled.append(means[len(means) // 5])
        goal = TARGET * fmean(r["float"] for r in cell.runs[BASE].values())
        axis.axhline(goal, color="black", lw=0.6, label="95 % of float")
        axis.set_ylim(min(settled) - 0.1 * (goal - min(settled)), None)
        axis.set_title(cell.setting["task"], fontsize=9)
        axis.set_xlabel("training step", fontsize=8)
        axis.set_ylabel("score on test data, %", fontsize=8)
        axis.tick_params(labelsize=7)
    handles, names = max((a.get_legend_handles_labels() for a in axes.flat), key=lambda pair: len(pair[1]))
    figure.legend(handles, names, loc="lower center", ncol=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    _save(figure, path)


def differences(rows: Sequence[Row], path: Path) -> None:
    """Steps to target, of the optimum less every other initializer, with intervals: left of 0 the optimum is faster."""
    figure, axes = plt.subplots(1, len(QUANTIZERS), figsize=(9.6, 4.2), sharex=True)
    for axis, quantizer in zip(axes, QUANTIZERS, strict=True):
        found = [cell for cell in main_cells(rows) if cell.setting["quantizer"] == quantizer]
        ticks, place = [], 0.0
        for bits in sorted({cell.setting["bits"] for cell in found}):
            for other in OTHERS:
                chosen = [cell for cell in found if cell.setting["bits"] == bits]
                result = pooled(chosen, MEASURES["target"], BASE, other)
                if result is not None:
                    half = min(result.half, 1e3)
                    axis.errorbar(
                        result.mean, place, xerr=half, fmt=MARKERS[other], color="black", ms=4, lw=0.9, mfc="white"
                    )
                    ticks.append((place, f"{bits} bits, {other}"))
                    place += 1
            place += 0.7
        axis.axvline(0, color="black", lw=0.6)
        axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=6)
        axis.invert_yaxis()
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(f"quantizer {quantizer}", fontsize=9)
        axis.set_xlabel("steps to target, optimal less other", fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def stress(rows: Sequence[Row], path: Path) -> None:
    """The final score at 1, 3 and 10 times the learning rate, and the share of diverged runs."""
    found = stressed(rows)
    factors = list(found)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3))
    for name, style in LINES.items():
        for axis, measure in zip(axes, ("final", "diverged"), strict=True):
            values = []
            for factor in factors:
                records = [record for cell in found[factor] for record in cell.runs.get(name, {}).values()]
                values.append(fmean(MEASURES[measure].of(r) for r in records) if records else float("nan"))
            if values == [value for value in values if value == value]:  # run at every factor
                axis.plot(factors, values, label=name, **style)
            axis.set_ylabel(f"{MEASURES[measure].title}, mean over runs", fontsize=8)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(factors, [f"{factor}x" for factor in factors])
        axis.set_xlabel("learning rate", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=6, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


PLOTS: dict[str, Callable[[Sequence[Row], Path], None]] = {
    "curves": curves,
    "differences": differences,
    "stress": stress,
}
