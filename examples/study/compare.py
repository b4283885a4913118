"""Results side by side: which runs differ in one thing alone, and by how much the measures of these differ."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any, NamedTuple

from measures import Interval, Measure, Record, interval
from run import DEFAULTS, key
from tasks import TASKS

Row = dict[str, Any]  # {"setting": ..., "record": ...}, a line of a results file
Runs = Mapping[int, Record]  # by seed


class Cell(NamedTuple):
    """Runs that differ in what is compared and in the seed, and in nothing else.

    Attributes:
        setting: what they share.
        runs: by what is compared (an initializer, a variant), then by seed.
    """

    setting: Mapping[str, Any]
    runs: Mapping[str, Runs]

    def differences(self, measure: Measure, first: str, second: str) -> dict[int, float]:
        """First less second, for every seed that both have run."""
        a, b = self.runs.get(first, {}), self.runs.get(second, {})
        return {seed: measure.difference(a[seed], b[seed]) for seed in sorted(set(a) & set(b))}


def cells(rows: Iterable[Row], compared: str) -> list[Cell]:
    """The rows as cells in which one entry of the setting is compared."""
    settings: dict[str, dict[str, Any]] = {}
    runs: dict[str, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        shared = {name: value for name, value in row["setting"].items() if name not in ("seed", compared)}
        settings[key(shared)] = shared
        runs[key(shared)][str(row["setting"][compared])][row["setting"]["seed"]] = row["record"]
    return [Cell(settings[name], runs[name]) for name in settings]


def pooled(chosen: Iterable[Cell], measure: Measure, first: str, second: str) -> Interval | None:
    """The mean difference over cells. Runs of a task and a seed share their float weights and count as one value."""
    values: dict[tuple[str, int], list[float]] = defaultdict(list)
    for cell in chosen:
        for seed, difference in cell.differences(measure, first, second).items():
            values[cell.setting["task"], seed].append(difference)
    return interval([fmean(value) for value in values.values()]) if values else None


def varied(setting: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are not as by default, of those that are no axis of the main grid."""
    axes = ("task", "quantizer", "bits", "initializer", "seed")
    found = {name: value for name, value in setting.items() if name in DEFAULTS and name not in axes}
    changed = {name: value for name, value in found.items() if value != DEFAULTS[name]}
    if setting["recipe"] != asdict(TASKS[setting["task"]].recipe):
        changed["recipe"] = setting["recipe"]
    return changed


def where(rows: Iterable[Row], test: Callable[[Mapping[str, Any]], bool]) -> list[Row]:
    """The rows whose setting passes a test."""
    return [row for row in rows if test(row["setting"])]


def stressed(rows: Iterable[Row]) -> dict[int, list[Cell]]:
    """By factor on the learning rate: the cells of which there are runs at more than one."""
    kept = where(rows, lambda s: s["part"] == "test" and set(varied(s)) <= {"lr_factor"})

    def place(setting: Mapping[str, Any]) -> str:
        return key({name: setting[name] for name in ("task", "quantizer", "bits")})

    places = {place(row["setting"]) for row in kept if row["setting"]["lr_factor"] != 1}
    found = cells(where(kept, lambda s: place(s) in places), "initializer")
    factors = sorted({cell.setting["lr_factor"] for cell in found})
    return {factor: [cell for cell in found if cell.setting["lr_factor"] == factor] for factor in factors}
