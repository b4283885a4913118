"""The tables of the study, in Markdown. Differences are those of the optimum less the other, paired by seed."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from compare import Cell, Row, cells, pooled, stressed, varied, where
from measures import MEASURES, Interval, Measure, interval
from tasks import TASKS

QUANTIZERS = ("lsq", "lsq+", "apot")
OTHERS = ("output", "lsq", "lsq+", "minmax", "percentile", "aciq", "sawb", "constant")
COMPARED = ("initial", "target", "loss50", "loss500", "final")
BASE = "optimal"
NARROW = {"name": "lsq", "narrow_range": True}
# Final score less the float network's, by bits: README of APoT's code, ResNet-20, 300 epochs, a float score of 92.96.
PUBLISHED = {2: 90.96 - 92.96, 3: 92.49 - 92.96, 4: 92.45 - 92.96}


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is to the left."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, marks, *lines))


def shown(found: Interval | None, better: int) -> str:
    """A difference; bold where the optimum is better and its interval says so, in italics where it is worse."""
    if found is None:
        return "-"
    mean, half = round(found.mean, 6), round(found.half, 6)  # floating-point dust is no digits
    text = f"{mean:+.3g}" if math.isinf(half) else f"{mean:+.3g} ± {half:.2g}"
    return {1: f"**{text}**", -1: f"*{text}*", 0: text}[found.sign * better]


def main_cells(rows: Sequence[Row]) -> list[Cell]:
    """The main grid: everything by default but the axes."""
    kept = where(rows, lambda s: s["part"] == "test" and s["quantizer"] in QUANTIZERS and not varied(s))
    return cells(kept, "initializer")


def tasks_table(rows: Sequence[Row]) -> str:
    """The float networks and the recipes."""
    lines = []
    for name, task in TASKS.items():
        floats = {
            row["setting"]["seed"]: row["record"]["float"]
            for row in rows
            if row["setting"]["task"] == name and row["setting"]["part"] == "test"
        }
        if floats:
            recipe = task.recipe
            scores = f"{min(floats.values()):.1f} to {max(floats.values()):.1f}"
            settings = [recipe.optimizer, f"{recipe.learning_rate:g}", str(recipe.steps), str(recipe.batch_size)]
            lines.append([name, scores, *settings, str(recipe.every)])
    return markdown(["task", "float score", "optimizer", "learning rate", "steps", "batch", "evaluated every"], lines)


def is_small(setting: Mapping[str, Any]) -> bool:
    """Whether a run is of the small tasks, which are taken together; CIFAR-10 stands by itself."""
    return not setting["task"].startswith("cifar10")


def pooled_table(rows: Sequence[Row], quantizer: str) -> str:
    """Of one quantizer: for each width and other initializer, differences over the small tasks."""
    found = [cell for cell in main_cells(rows) if cell.setting["quantizer"] == quantizer and is_small(cell.setting)]
    return _against(found)


def cifar10_table(rows: Sequence[Row], task: str = "cifar10") -> str:
    """CIFAR-10 by itself, quantizer by quantizer."""
    found = [cell for cell in main_cells(rows) if cell.setting["task"] == task]
    parts = {name: [cell for cell in found if cell.setting["quantizer"] == name] for name in QUANTIZERS}
    return _against(*parts.values(), names=[f"{name}, " for name in parts])


def long_table(rows: Sequence[Row]) -> str:
    """The long schedule of CIFAR-10: what quantization costs, next to what is published; then the differences."""
    found = [cell for cell in main_cells(rows) if cell.setting["task"] == "cifar10-long"]
    if not found:
        return "Not run."
    widths = sorted({cell.setting["bits"] for cell in found})
    lines = []
    for quantizer in QUANTIZERS:
        own = [cell for cell in found if cell.setting["quantizer"] == quantizer]
        by_bits = [[cell for cell in own if cell.setting["bits"] == bits] for bits in widths]
        for name in (BASE, *OTHERS):
            costs = [_cost(chosen, name) for chosen in by_bits]
            if any(cost != "-" for cost in costs):
                lines.append([f"{quantizer}, {name}", *costs])
    lines.append(["APoT, published", *(f"{PUBLISHED[b]:+.3g}" if b in PUBLISHED else "-" for b in widths)])
    costs_table = markdown(["final score less float", *(f"{bits} bits" for bits in widths)], lines)
    return f"{costs_table}\n\n{cifar10_table(rows, 'cifar10-long')}"


def _cost(chosen: Sequence[Cell], name: str) -> str:
    records = [record for cell in chosen for record in cell.runs.get(name, {}).values()]
    return shown(interval([MEASURES["final"].of(r) - r["float"] for r in records]), 0) if records else "-"


def norms_table(rows: Sequence[Row], cifar10: bool) -> str:
    """With BatchNorm statistics re-estimated under quantization, whatever the initializer."""
    kept = where(rows, lambda s: set(varied(s)) == {"recalibrate_batchnorm"} and is_small(s) != cifar10)
    return _against(cells(kept, "initializer"))


def narrow_table(rows: Sequence[Row]) -> str:
    """With as many levels on either side of zero."""
    small = where(rows, lambda s: s["quantizer"] == NARROW and is_small(s))
    return _against(cells(small, "initializer"))


def _against(*parts: Sequence[Cell], names: Sequence[str] = ("",)) -> str:
    """For each width and other initializer, the differences over the cells; for parts of them, one after the other."""
    lines = [line for name, found in zip(names, parts, strict=True) for line in _lines(name, found)]
    return markdown([f"{BASE} less ...", *(m.title for m in _compared())], lines)


def _lines(name: str, found: Sequence[Cell]) -> list[list[str]]:
    lines = []
    for bits in sorted({cell.setting["bits"] for cell in found}):
        chosen = [cell for cell in found if cell.setting["bits"] == bits]
        for other in OTHERS:
            if any(cell.differences(MEASURES["final"], BASE, other) for cell in chosen):
                differences = [shown(pooled(chosen, m, BASE, other), m.better) for m in _compared()]
                lines.append([f"{name}{bits} bits, {other}", *differences])
    return lines


def _compared() -> list[Measure]:
    return [MEASURES[name] for name in COMPARED]


def verdicts_table(rows: Sequence[Row]) -> str:
    """In how many cells the optimum was better, tied or worse, by the interval of each cell and by its mean."""
    lines = []
    for other in OTHERS:
        counts = [_count(rows, MEASURES[name], other) for name in COMPARED]
        if counts[0] != "-":
            lines.append([other, *counts])
    return markdown(["against", *(m.title for m in _compared())], lines)


def _count(rows: Sequence[Row], measure: Measure, other: str) -> str:
    found = [list(cell.differences(measure, BASE, other).values()) for cell in main_cells(rows)]
    signs = [interval(values).sign * measure.better for values in found if len(values) > 1]
    return f"{signs.count(1)} / {signs.count(0)} / {signs.count(-1)}" if signs else "-"


def exceptions_table(rows: Sequence[Row], name: str = "target") -> str:
    """Every cell and other initializer where the optimum is worse by the mean, with its interval."""
    measure, lines = MEASURES[name], []
    for cell in main_cells(rows):
        for other in OTHERS:
            values = list(cell.differences(measure, BASE, other).values())
            if len(values) > 1 and fmean(values) * measure.better < 0:
                s = cell.setting
                final = interval(list(cell.differences(MEASURES["final"], BASE, other).values()))
                label = f"{s['task']}, {s['quantizer']}, {s['bits']} bits, {other}"
                lines.append([label, shown(interval(values), measure.better), shown(final, 1)])
    return markdown(["cell", measure.title, MEASURES["final"].title], lines) if lines else "None."


def spread_table(rows: Sequence[Row]) -> str:
    """The standard deviation of the final score over seeds, as root mean square over the cells that all have."""
    lines = []
    for quantizer in QUANTIZERS:
        found = [cell for cell in main_cells(rows) if cell.setting["quantizer"] == quantizer]
        for name in (BASE, *OTHERS):
            by_bits = [_spread([c for c in found if c.setting["bits"] == bits], name) for bits in (2, 3, 4, 8)]
            if any(value != "-" for value in by_bits):
                lines.append([f"{quantizer}, {name}", *by_bits])
    return markdown(["quantizer, initializer", "2 bits", "3 bits", "4 bits", "8 bits"], lines)


def _spread(chosen: Sequence[Cell], name: str) -> str:
    final = MEASURES["final"].of
    scores = [[final(r) for r in cell.runs.get(name, {}).values()] for cell in chosen]
    deviations = [stdev(values) for values in scores if len(values) > 1]
    return f"{math.sqrt(fmean(d * d for d in deviations)):.2f}" if deviations else "-"


def stress_table(rows: Sequence[Row]) -> str:
    """At 1, 3 and 10 times the learning rate, by width: diverged runs, drift, and differences of the final score."""
    by_factor = stressed(rows)
    widths = sorted({cell.setting["bits"] for found in by_factor.values() for cell in found})
    names = [n for n in (BASE, *OTHERS) if all(any(n in cell.runs for cell in found) for found in by_factor.values())]
    lines = []
    for factor, found in by_factor.items():
        for name in names:
            by_bits = [[cell for cell in found if cell.setting["bits"] == bits] for bits in widths]
            diverged, drift = (_means(by_bits, MEASURES[measure], name) for measure in ("diverged", "drift"))
            final = ["" if name == BASE else shown(pooled(c, MEASURES["final"], BASE, name), 1) for c in by_bits]
            lines.append([f"{factor}x, {name}", diverged, drift, *final])
    of_all = ", ".join(f"{bits}" for bits in widths)
    titles = [f"{MEASURES[measure].title} (at {of_all} bits)" for measure in ("diverged", "drift")]
    finals = [f"final score, optimal less it, {bits} bits" for bits in widths]
    return markdown(["learning rate, initializer", *titles, *finals], lines)


def _means(by_bits: Sequence[Sequence[Cell]], measure: Measure, name: str) -> str:
    """The mean over runs for each width, one after the other."""
    values = [[measure.of(record) for cell in found for record in cell.runs[name].values()] for found in by_bits]
    return ", ".join(f"{fmean(some):.2g}" for some in values)


def ablation_table(rows: Sequence[Row], cifar10: bool) -> str:
    """Each variant of the optimum less the default, over all cells that hold both, for each width."""
    kept = where(rows, lambda s: s["part"] == "test" and is_small(s) != cifar10)
    found = cells([row for row in map(_relabelled, kept) if row], "variant")
    lines = []
    for name in sorted({name for cell in found for name in cell.runs} - {"default"}):
        for bits in sorted({cell.setting["bits"] for cell in found if name in cell.runs}):
            chosen = [cell for cell in found if cell.setting["bits"] == bits]
            differences = [shown(pooled(chosen, m, name, "default"), m.better) for m in _compared()]
            lines.append([f"{name}, {bits} bits", *differences])
    return markdown(["variant less default", *(m.title for m in _compared())], lines)


def _relabelled(row: Row) -> Row | None:
    """The same with what differs from the default as one entry, ``variant``; ``None`` for what is no variant."""
    setting, changed = row["setting"], varied(row["setting"])
    if {"recipe", "lr_factor"} & set(changed) or setting["initializer"] not in (BASE, "mse_grid"):
        return None
    if setting["initializer"] != BASE:
        changed["initializer"] = setting["initializer"]
    if setting["quantizer"] == NARROW:
        changed["narrow_range"] = True
    elif setting["quantizer"] != "lsq":
        return None
    variant = ", ".join(f"`{name}={value}`" for name, value in changed.items()) or "default"
    shared = {name: setting[name] for name in ("task", "bits", "seed")}
    return {"setting": {**shared, "variant": variant}, "record": row["record"]}


def tune_table(rows: Sequence[Row]) -> str:
    """The final score on held-out data from LSQ's start, by the factor on the learning rate."""
    found = cells(where(rows, lambda s: s["part"] == "held_out"), "lr_factor")
    factors = sorted({float(name) for cell in found for name in cell.runs})
    lines = []
    for cell in found:
        by_factor = {float(name): runs for name, runs in cell.runs.items()}
        scores = [
            f"{fmean(MEASURES['final'].of(r) for r in by_factor[f].values()):.1f}" if f in by_factor else "-"
            for f in factors
        ]
        s = cell.setting
        lines.append([f"{s['task']}, {s['bits']} bits, {s['recipe']['learning_rate']:g}", *scores])
    return markdown(["task, learning rate", *(f"x{f:g}" for f in factors)], lines)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "tasks": tasks_table,
    "lsq": lambda rows: pooled_table(rows, "lsq"),
    "lsq+": lambda rows: pooled_table(rows, "lsq+"),
    "apot": lambda rows: pooled_table(rows, "apot"),
    "verdicts": verdicts_table,
    "exceptions": exceptions_table,
    "spread": spread_table,
    "stress": stress_table,
    "cifar10": cifar10_table,
    "cifar10-long": long_table,
    "norms": lambda rows: norms_table(rows, cifar10=False),
    "cifar10-norms": lambda rows: norms_table(rows, cifar10=True),
    "narrow": narrow_table,
    "ablations": lambda rows: ablation_table(rows, cifar10=False),
    "cifar10-variants": lambda rows: ablation_table(rows, cifar10=True),
    "tune": tune_table,
}
