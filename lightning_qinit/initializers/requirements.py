"""What a rule needs of the levels: said in one sentence, before any data is read."""

from torch import Tensor

from lightning_qinit.functional.levels import is_uniform


def require(holds: bool, rule: str, needs: str, levels: Tensor) -> None:
    """Raise ``ValueError`` unless the levels suit the rule."""
    if not holds:
        shown = ", ".join(f"{level:.4g}" for level in levels[:3].tolist())
        raise ValueError(f"{rule} needs {needs}; these {len(levels)} levels start with {shown}.")


def require_uniform(rule: str, levels: Tensor) -> None:
    """Raise ``ValueError`` unless the levels are evenly spaced, as integers or as -1 and 1 are."""
    require(is_uniform(levels), rule, "uniform levels", levels)


def bits_of(levels: Tensor) -> int:
    """The least number of bits that can number the levels."""
    return (len(levels) - 1).bit_length()
