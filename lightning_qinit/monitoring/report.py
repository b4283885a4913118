"""What calibration chose, what it cost, and what other initializers would have cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_qinit.calibration import Start
from lightning_qinit.calibration.measure import COMPARED


@dataclass(frozen=True)
class ReportRow:
    """One quantizer after calibration.

    Attributes:
        layer: name of the layer.
        what: ``"weight"`` or ``"input"``, or the name of the parameter or input in layers with several.
        bits: 1 to 8.
        signed: whether its levels reach below zero.
        steps: number of steps: 1, or one per channel.
        step: the step, or the mean over channels.
        offset: the same for quantizers that have one, else ``None``.
        error: relative squared error on the data that calibration saw.
        clipped: share of values more than half a step beyond the outermost levels.
        alternatives: the relative squared error that other initializers would have had; a rule that has no
            answer for the levels is missing.
        note: a guard that acted, a fallback that was taken; empty for nothing.
    """

    layer: str
    what: str
    bits: int
    signed: bool
    steps: int
    step: float
    offset: float | None
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


def make_row(start: Start) -> ReportRow:
    """The row of a planned start."""
    return ReportRow(
        layer=start.layer,
        what=start.what,
        bits=start.bits,
        signed=start.signed,
        steps=start.quantizer.initial_step.numel(),
        step=float(start.step.mean()),
        offset=None if start.offset is None else float(start.offset.mean()),
        error=start.measures.error,
        clipped=start.measures.clipped,
        alternatives=start.measures.alternatives,
        note=start.note,
    )


def format_report(rows: Sequence[ReportRow], unseen: Sequence[str] = (), left_float: Sequence[str] = ()) -> str:
    """The report as a plain-text table, with the layers that saw no data and the tensors left in float below it."""
    offsets = any(row.offset is not None for row in rows)
    header = ["quantizer", "bits", "sign", "step", *(["offset"] if offsets else [])]
    header += ["SQNR dB", "clipped %", "error", *(f"/ {name}" for name in COMPARED)]
    table = [header]
    for row in rows:
        table.append(
            [
                row.name,
                str(row.bits),
                "+-" if row.signed else "+",
                f"{row.step:.4g}" + (f" x{row.steps}" if row.steps > 1 else ""),
                *([] if not offsets else ["" if row.offset is None else f"{row.offset:.4g}"]),
                f"{row.sqnr_db:.1f}",
                f"{100 * row.clipped:.2f}",
                f"{row.error:.2e}",
                *(_ratio(row.error, row.alternatives.get(name)) for name in COMPARED),
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


def _ratio(error: float, other: float | None) -> str:
    if other is None:
        return "-"
    return f"{error / other:.3f}" if other > 0 else "1.000"
