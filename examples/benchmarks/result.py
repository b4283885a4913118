"""How the benchmarks here show and keep what they measure."""

import argparse
import json
import platform
import statistics
from typing import Any

import torch


def spread(values: list[float], width: int = 5) -> str:
    """The median, with the least and the greatest."""
    return f"{statistics.median(values):{width}.2f} ({min(values):.2f}-{max(values):.2f})"


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """To ``--json``, with the settings, the machine and the version of torch."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    with open(arguments.json, "w") as file:
        json.dump({**vars(arguments), "torch": torch.__version__, "machine": machine, "rows": rows}, file, indent=1)
