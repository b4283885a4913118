"""Runs a grid of quantization-aware trainings, and keeps each as a line of JSON.

python examples/study/run.py --preset quick                      # digits, no data needed
python examples/study/run.py --preset full --data-root data      # see README.md for the data

A preset is a YAML file beside this script, or a path to one. What is in ``--results`` already is not run again, so a
run that was stopped goes on where it was.
"""

import argparse
import copy
import itertools
import json
import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from data import Data
from measures import Recorder, score
from tasks import TASKS, Learner, batches, float_network, trainer

from lightning_qinit import QuantInitCallback

HERE = Path(__file__).parent
Setting = dict[str, Any]

# What a grid may set, and what it is otherwise: the first five are the study's own, the others the callback's.
DEFAULTS: Setting = {
    "task": "digits",
    "bits": 4,
    "seed": 0,
    "lr_factor": 1,
    "part": "test",
    "quantizer": "lsq",
    "initializer": "optimal",
    "per_channel": True,
    "first_last_bits": 8,
    "calibration_batches": 16,
    "criterion": "mse",
    "sequential": False,
    "recalibrate_batchnorm": False,
}
# What is compared as an initializer and is more than one. SAWB is a rule for weights; inputs beside it start from the
# percentile, as in IBM's code.
STARTS: dict[str, Setting] = {
    "sawb": {"weight_initializer": "sawb", "activation_initializer": "percentile"},
    "output": {"initializer": "optimal", "criterion": "output"},
}


def settings(grid: dict[str, Any]) -> Iterator[Setting]:
    """All combinations of a grid that the package accepts, seed by seed, those to compare next to each other."""
    axes: dict[str, list[Any]] = {}
    for axis in ("seed", "task", "quantizer", "bits", *grid):
        value = grid.get(axis, DEFAULTS.get(axis))
        axes[axis] = value if isinstance(value, list) else [value]
    unknown = set(axes) - set(DEFAULTS) - {"recipe"}
    if unknown:
        raise SystemExit(f"A grid may set {', '.join([*DEFAULTS, 'recipe'])}, got {', '.join(sorted(unknown))}.")
    for values in itertools.product(*axes.values()):
        setting = {**DEFAULTS, **dict(zip(axes, values, strict=True))}
        recipe = asdict(replace(TASKS[setting["task"]].recipe, **setting.get("recipe") or {}))
        setting["recipe"] = recipe
        try:
            callback(setting)
        except ValueError:  # a rule that has no answer for these levels
            continue
        yield setting


def callback(setting: Setting) -> QuantInitCallback:
    """The callback of a setting, which measures nothing itself."""
    own = {name: setting[name] for name in list(DEFAULTS)[7:]}
    start = STARTS.get(setting["initializer"], {"initializer": setting["initializer"]})
    return QuantInitCallback(
        weight_bits=setting["bits"],
        activation_bits=setting["bits"],
        quantizer=setting["quantizer"],
        **{**own, **start},
        log_quantizers=False,
        log_figures=0,
        print_report=False,
    )


class Runner:
    """Runs settings; data and float networks are loaded once."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache
        self.data: dict[str, Data] = {}
        self.floats: dict[tuple[str, int], tuple[torch.nn.Module, dict[str, float]]] = {}

    def run(self, setting: Setting) -> dict[str, Any]:
        """Train from the float weights of the seed, on its order of batches, and return the record."""
        name, seed, part = setting["task"], setting["seed"], setting["part"]
        if name not in self.data:
            self.data[name] = TASKS[name].load(self.root)
        parts = self.data[name]
        recipe = replace(TASKS[name].recipe, **setting["recipe"])
        if (name, seed) not in self.floats:
            file = self.cache / f"{name}-{seed}.pt"
            net = float_network(TASKS[name], parts, seed, self.root, file)
            self.floats[name, seed] = (net, {})
        net, scores = self.floats[name, seed]
        if part not in scores:
            scores[part] = score(net, getattr(parts, part))
        torch.manual_seed(seed)
        learner = Learner(copy.deepcopy(net), recipe, recipe.learning_rate * setting["lr_factor"], recipe.steps)
        recorder = Recorder(getattr(parts, part), recipe.every)
        fit = trainer(recipe.steps, callback(setting), recorder)
        fit.fit(learner, batches(parts.train, recipe.batch_size, 1000 + seed))
        return recorder.record(learner.net, scores[part])


def key(setting: Setting) -> str:
    """What makes two runs the same: all of the setting."""
    return json.dumps(setting, sort_keys=True)


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of JSON files."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def mend(path: Path) -> None:
    """Take out a last line that was cut off when a run was stopped."""
    text = path.read_text() if path.exists() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text[: text.rfind("\n") + 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quick", help="name of a YAML file beside this script, or a path")
    parser.add_argument("--data-root", default="data", type=Path, help="folder of the data (README.md)")
    parser.add_argument("--results", type=Path, help="file to add to; results/<preset>.jsonl if not given")
    parser.add_argument("--cache", default="runs/study", type=Path, help="folder of the trained float weights")
    parser.add_argument("--seeds", type=int, help="run only the seeds below this, for a first look")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*GPU available.*|.*treespec.*")

    preset = Path(arguments.preset) if arguments.preset.endswith(".yaml") else HERE / f"{arguments.preset}.yaml"
    results = arguments.results or HERE / "results" / f"{preset.stem}.jsonl"
    wanted = [setting for grid in yaml.safe_load(preset.read_text()) for setting in settings(grid)]
    if arguments.seeds is not None:
        wanted = [setting for setting in wanted if setting["seed"] < arguments.seeds]
    wanted.sort(key=lambda setting: setting["seed"])  # stable: a grid that is half done holds whole comparisons
    mend(results)
    done = {key(row["setting"]) for row in read(results.parent.glob("*.jsonl"))}
    missing = {key(setting): setting for setting in wanted if key(setting) not in done}
    print(f"{len(wanted)} runs, {len(missing)} to do.", flush=True)

    runner = Runner(arguments.data_root, arguments.cache)
    for number, setting in enumerate(missing.values(), 1):
        begin = time.perf_counter()
        record = runner.run(setting)
        with open(results, "a") as file:
            file.write(json.dumps({"setting": setting, "record": record}) + "\n")
        shown = " ".join(str(setting[name]) for name in ("task", "quantizer", "bits", "initializer", "seed"))
        (_, first), (_, last) = record["scores"][0], record["scores"][-1]
        seconds = time.perf_counter() - begin
        print(f"{number}/{len(missing)} {shown}: {first:.1f} -> {last:.1f} ({seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
