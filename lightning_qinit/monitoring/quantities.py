"""What can be logged of a quantizer, and under which name."""

from collections.abc import Iterable
from typing import Literal

from lightning_qinit.checks import check

Quantity = Literal[
    "step",
    "offset",
    "drift",
    "error",
    "sqnr_db",
    "clipped",
    "levels_used",
    "still",
    "to_optimal",
    "oscillation",
    "frozen",
]

# The text before the slash of the logged names, by which TensorBoard groups: one card per quantity.
PREFIXES: dict[Quantity, str] = {
    "step": "quant_step",  # in units of the data; the mean over channels
    "offset": "quant_offset",
    "drift": "quant_step_drift",  # relative to where the step started
    "error": "quant_error",  # relative squared error
    "sqnr_db": "quant_sqnr_db",
    "clipped": "quant_clipped",  # share of values more than half a step beyond the outermost points
    "levels_used": "quant_levels_used",  # share of levels that some value is rounded to
    "still": "quant_still",  # share of weights whose integer is that of the last logging step
    "to_optimal": "quant_step_to_optimal",  # relative to the step of least error on these values
    "oscillation": "quant_oscillation",  # mean rate of integer flips back and forth
    "frozen": "quant_frozen",  # share of weights that are frozen for oscillating
}
DEFAULT: tuple[Quantity, ...] = (
    "step", "offset", "drift", "error", "sqnr_db", "clipped", "levels_used", "still", "to_optimal"
)  # fmt: skip
AGGREGATES = ("quant_error/mean", "quant_error/max")


def choose_quantities(asked: bool | Iterable[str]) -> tuple[Quantity, ...]:
    """The quantities that an argument asks for.

    ``True`` stands for all but ``"oscillation"`` and ``"frozen"``, which need a look at every step.

    Raises:
        ValueError: for a name that is none of them.
    """
    if isinstance(asked, bool):
        return DEFAULT if asked else ()
    check("log_quantizers", asked, isinstance(asked, Iterable), f"True, False or a list of {list(PREFIXES)}")
    chosen = (asked,) if isinstance(asked, str) else tuple(asked)
    unknown = [name for name in chosen if name not in PREFIXES]
    if unknown:
        raise ValueError(
            f"`log_quantizers` must be True, False or a list of {list(PREFIXES)}, got {unknown[0]!r} in it."
        )
    return tuple(name for name in PREFIXES if name in chosen)


def aggregates(errors: list[float]) -> dict[str, float]:
    """The mean and the worst of all relative errors, by their logged names; nothing if there are none."""
    return dict(zip(AGGREGATES, (sum(errors) / len(errors), max(errors)), strict=True)) if errors else {}
