"""How the benchmarks here run: a Trainer that only trains, and measurements in a process of their own."""

import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl


def hush() -> None:
    """Leave the output to the benchmark."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def bare_trainer(**settings: Any) -> pl.Trainer:
    """Without logger, checkpoints and displays, but for what is set."""
    none: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    return pl.Trainer(**{**none, "enable_progress_bar": False, "enable_model_summary": False, **settings})


def seconds(run: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def apart(script: str, *arguments: object, **environment: str) -> Any:
    """What a script prints as JSON, in a process of its own."""
    command = [sys.executable, script, *map(str, arguments)]
    result = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in result.stdout.splitlines()[::-1] if line.startswith(("{", "["))))
