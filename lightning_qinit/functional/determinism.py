"""Sums on a GPU whose order is not fixed."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

_MODE = RLock()  # the mode is that of all threads


@contextmanager
def any_order() -> Iterator[None]:
    """Allow sums in any order while open, also under ``Trainer(deterministic=True)``.

    On a GPU torch refuses weighted ``bincount`` and ``cumsum`` in that mode. Sketches hold whole numbers, whose sums
    are the same in any order; the solver's float64 sums differ in their last bits at most, before the step is rounded
    to float32.
    """
    with _MODE:
        enabled = torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warns)
