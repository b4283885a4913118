"""Random generators of torch, numpy and Python, put back where they were."""

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch


def is_generator(value: Any) -> bool:
    """Whether a value is a random generator of its own."""
    of_numpy = type(value).__module__.startswith("numpy.random") and hasattr(value, "standard_normal")
    return of_numpy or isinstance(value, (torch.Generator, random.Random))


FEW = 100  # members of a list that are looked at: one of transforms has fewer, one of samples has nothing to find


def generators_in(*holders: Any) -> Iterator[Any]:
    """The generators that objects hold as attributes, or in lists and mappings, at any depth; each once."""
    seen: set[int] = set()
    waiting = list(holders)
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (type, ModuleType)):
            continue
        seen.add(id(value))
        if is_generator(value):
            yield value
        elif isinstance(value, (list, tuple)):
            waiting.extend(value[:FEW])
        elif isinstance(value, dict):
            waiting.extend(list(value.values())[:FEW])
        elif not isinstance(value, torch.Tensor):
            waiting.extend(getattr(value, "__dict__", {}).values())


def keep_generator(value: Any) -> Callable[[], object]:
    """What gives a generator the state that it has now."""
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if hasattr(value, "bit_generator"):  # numpy's
        return partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
    return partial(value.set_state, value.get_state())  # torch's, and numpy's RandomState
