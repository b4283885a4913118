"""Random generators of torch, numpy and Python, put back where they were."""

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def is_generator(value: Any) -> bool:
    """Whether a value is a random generator of its own."""
    of_numpy = type(value).__module__.startswith("numpy.random") and hasattr(value, "standard_normal")
    return of_numpy or isinstance(value, (torch.Generator, random.Random))


def keep_generator(value: Any) -> Callable[[], object]:
    """What gives a generator the state that it has now."""
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if hasattr(value, "bit_generator"):  # numpy's
        return partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
    return partial(value.set_state, value.get_state())  # torch's, and numpy's RandomState
