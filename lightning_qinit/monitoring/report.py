"""What calibration chose, what it cost, and what other initializers would have cost."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # no stubs

from lightning_qinit.calibration import Start

SHOWN = ("minmax", "lsq")
"""Initializers that the table compares with; the rows hold more."""
WORST = 5


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
    """The report as a plain-text table, with what there is to say about it below."""
    lines = aligned([_cells(row, _has_offsets(rows)) for row in (None, *rows)])
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, *remarks(rows, unseen, left_float)])


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines of plain text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]


def markdown_report(rows: Sequence[ReportRow]) -> str:
    """The report as a Markdown table, the worst quantizers first."""
    offsets = _has_offsets(rows)
    header = _cells(None, offsets)
    ordered = sorted(rows, key=lambda row: -row.error)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(_cells(row, offsets) for row in ordered)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def remarks(rows: Sequence[ReportRow], unseen: Sequence[str] = (), left_float: Sequence[str] = ()) -> list[str]:
    """What the table does not say: what its columns are, where the signal is lost, what guards did, what is left."""
    others = " and ".join(SHOWN)
    lines = [f"error: squared error relative to the signal; then the same as a fraction of that of {others}."]
    lossy = [row for row in sorted(rows, key=lambda row: -row.error) if row.error > 0][:WORST]
    if lossy:
        lines.append("Most signal is lost in " + ", ".join(f"{row.name} ({row.sqnr_db:.1f} dB)" for row in lossy) + ".")
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(row.note, []).append(row.name)
    lines += [f"{note[0].upper()}{note[1:]}: {', '.join(names)}." for note, names in notes.items()]
    if unseen:
        lines.append(f"No data seen, left in float: {', '.join(unseen)}.")
    if left_float:
        lines.append(f"Not quantized: {', '.join(left_float)}.")
    return lines


def rich_report(rows: Sequence[ReportRow]) -> Any:
    """The report as a table of the ``rich`` package.

    Raises:
        ModuleNotFoundError: without that package.
    """
    from rich.table import Table

    offsets = _has_offsets(rows)
    name, *others = _cells(None, offsets)
    table = Table(title="Quantizers after calibration")
    table.add_column(name)
    for column in others:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*_cells(row, offsets))
    return table


def write_report(rows: Sequence[ReportRow], folder: str | Path) -> None:
    """Write the rows as ``quantization.csv`` and ``quantization.json``, to any folder that fsspec knows."""
    files, path = url_to_fs(str(folder))
    files.makedirs(path, exist_ok=True)
    plain = [{**asdict(row), "sqnr_db": row.sqnr_db if row.error > 0 else None} for row in rows]
    with files.open(f"{path}/quantization.json", "w") as file:
        json.dump(plain, file, indent=1)
    flat = []
    for row in plain:
        alternatives = row.pop("alternatives")
        flat.append({**row, **{f"error of {name}": value for name, value in alternatives.items()}})
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with files.open(f"{path}/quantization.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)


def _has_offsets(rows: Sequence[ReportRow]) -> bool:
    return any(row.offset is not None for row in rows)


def _cells(row: ReportRow | None, offsets: bool) -> list[str]:
    """A line of the table; its header for ``None``."""
    if row is None:
        columns = ["quantizer", "bits", "sign", "step", *(["offset"] if offsets else [])]
        return [*columns, "SQNR dB", "clipped %", "error", *(f"/ {name}" for name in SHOWN)]
    return [
        row.name,
        str(row.bits),
        "+-" if row.signed else "+",
        f"{row.step:.4g}" + (f" x{row.steps}" if row.steps > 1 else ""),
        *([] if not offsets else ["" if row.offset is None else f"{row.offset:.4g}"]),
        f"{row.sqnr_db:.1f}",
        f"{100 * row.clipped:.2f}",
        f"{row.error:.2e}",
        *(_ratio(row.error, row.alternatives.get(name)) for name in SHOWN),
    ]


def _ratio(error: float, other: float | None) -> str:
    if other is None:
        return "-"
    return f"{error / other:.3f}" if other > 0 else "1.000"
