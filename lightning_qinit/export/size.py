"""How much smaller a model is as integers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_qinit.export.integers import PARTS, integer_state_dict
from lightning_qinit.monitoring.report import aligned


@dataclass(frozen=True)
class SizeRow:
    """Bytes of one tensor of a model's state.

    Attributes:
        name: its key; ``""`` for the whole model.
        bits: of its codes; ``None`` if it stays in float.
        float_bytes: as it is in the float model.
        bytes: packed, with its steps and what else describes it.
    """

    name: str
    bits: int | None
    float_bytes: int
    bytes: int


def size_report(module: nn.Module) -> list[SizeRow]:
    """What each tensor of a quantized module takes in float and as packed integers; the whole model comes last.

    Args:
        module: a calibrated module; it is not changed.

    Raises:
        ValueError: if no quantizer is calibrated, or a layer cannot be exported.
    """
    packed = integer_state_dict(module)
    rows = []
    for key, value in module.state_dict().items():
        bits = int(packed[f"{key}.layout"][0]) if f"{key}.layout" in packed else None
        parts = [packed.pop(k) for k in (key, *(f"{key}.{part}" for part in PARTS)) if k in packed]
        if not parts:
            continue  # of a quantizer
        rows.append(SizeRow(key, bits, value.nbytes, sum(part.nbytes for part in parts)))
    inputs = sum(part.nbytes for part in packed.values())  # all that is left
    total = SizeRow("", None, sum(row.float_bytes for row in rows), sum(row.bytes for row in rows) + inputs)
    return [*rows, total]


def format_size(rows: Sequence[SizeRow]) -> str:
    """The report as a plain-text table."""
    lines = [("tensor", "bits", "float bytes", "packed bytes", "ratio")]
    for row in rows:
        ratio = f"{row.float_bytes / row.bytes:.2f}" if row.bytes else ""
        name = row.name or "all, with input steps"
        lines.append(
            (name, "float" if row.bits is None else str(row.bits), str(row.float_bytes), str(row.bytes), ratio)
        )
    return "\n".join(aligned(lines))
