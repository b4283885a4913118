"""Checks of single arguments: a sentence that names the argument, what is accepted and what was given."""

from collections.abc import Sequence
from typing import Any


def is_number(value: Any) -> bool:
    """Whether this is an int or a float; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether this is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check(argument: str, value: Any, holds: bool, accepted: str) -> None:
    """Raise ``ValueError`` unless it holds: the argument must be what is accepted."""
    if not holds:
        raise ValueError(f"`{argument}` must be {accepted}, got {value!r}.")


def check_bits(argument: str, bits: Any) -> None:
    """Raise ``ValueError`` unless ``bits`` is a whole number from 1 to 8, or ``None``."""
    check(argument, bits, bits is None or (is_whole(bits) and 1 <= bits <= 8), "a whole number from 1 to 8, or None")


def check_whole(argument: str, value: Any, least: int) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number of at least ``least``."""
    check(argument, value, is_whole(value) and value >= least, f"a whole number of at least {least}")


def check_flag(argument: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is True or False."""
    check(argument, value, isinstance(value, bool), "True or False")


def shorten(names: Sequence[str], most: int = 8) -> str:
    """A list of names for a message: the first few, and how many more."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
