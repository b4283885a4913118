"""What calibration chose, what it cost, and what other initializers would have cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_qinit.calibration import Start
from lightning_qinit.initializers import INITIALIZERS, usable


@dataclass(frozen=True)
class ReportRow:
    """One quantizer after calibration.

    Attributes:
        layer: name of the layer.
        what: ``"weight"`` or ``"input"``.
        bits: 1 to 8.
        signed: whether its levels reach below zero.
        steps: number of steps: 1, or one per channel.
        step: the step, or the mean over channels.
        error: relative squared error on the data that calibration saw.
        clipped: share of values more than half a step beyond the outermost levels.
        alternatives: the relative squared error that each other initializer would have had.
        note: a guard that acted, a fallback that was taken; empty for nothing.
    """

    layer: str
    what: str
    bits: int
    signed: bool
    steps: int
    step: float
    error: float
    clipped: float
    alternatives: Mapping[str, float]
    note: str = ""

    @property
    def name(self) -> str:
        """``layer.what``, as in the logged names."""
        return f"{self.layer}.{self.what}"

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB."""
        return -10 * math.log10(self.error) if self.error > 0 else math.inf


COMPARED = ("minmax", "lsq")
"""Initializers that every report compares with."""


def make_row(start: Start) -> ReportRow:
    """Measure a planned start on the data that it was chosen for."""
    sample, levels = start.sample, start.levels

    def error(step: Tensor) -> float:
        energy = float(sample.energy.sum())
        return float(sample.error(levels, step).sum()) / energy if energy > 0 else 0.0

    return ReportRow(
        layer=start.layer,
        what=start.what,
        bits=start.bits,
        signed=start.signed,
        steps=start.quantizer.step.numel(),
        step=float(start.step.mean()),
        error=error(start.step),
        clipped=sample.share_clipped(levels, start.step),
        alternatives={name: error(usable(INITIALIZERS[name](sample, levels), sample).step) for name in COMPARED},
        note=start.note,
    )


def format_report(rows: Sequence[ReportRow], unseen: Sequence[str] = (), left_float: Sequence[str] = ()) -> str:
    """The report as a plain-text table, with the layers that saw no data and the tensors left in float below it."""
    header = ["quantizer", "bits", "sign", "step", "SQNR dB", "clipped %", "error", *(f"/ {name}" for name in COMPARED)]
    table = [header]
    for row in rows:
        table.append(
            [
                row.name,
                str(row.bits),
                "+-" if row.signed else "+",
                f"{row.step:.4g}" + (f" x{row.steps}" if row.steps > 1 else ""),
                f"{row.sqnr_db:.1f}",
                f"{100 * row.clipped:.2f}",
                f"{row.error:.2e}",
                *(_ratio(row.error, row.alternatives[name]) for name in COMPARED),
            ]
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in table]
    lines.insert(1, "-" * len(lines[0]))
    names = ", ".join(COMPARED)
    lines.append(f"error: squared error relative to the signal; then the same as a fraction of that of {names}.")
    lines += [f"{row.name}: {row.note}." for row in rows if row.note]
    if unseen:
        lines.append(f"No data seen, left in float: {', '.join(unseen)}.")
    if left_float:
        lines.append(f"Not quantized: {', '.join(left_float)}.")
    return "\n".join(lines)


def _ratio(error: float, other: float) -> str:
    return f"{error / other:.3f}" if other > 0 else "1.000"
