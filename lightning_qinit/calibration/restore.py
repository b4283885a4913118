"""Put a module back as it was, whatever ran in between."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_qinit.generators import is_generator, keep_generator

Restore = Callable[[], object]


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Afterwards every parameter, buffer, attribute and builtin container of a module and all below it is as before."""
    restores: list[Restore] = []
    seen: set[int] = set()
    for child in module.modules():
        restores.append(_keep_attributes(child, seen))
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is not None:
                restores.append(_keep_tensor(tensor, seen))
    try:
        yield
    finally:
        for child in module.modules():
            if callable(reshard := getattr(child, "reshard", None)):  # FSDP2 may still hold whole parameters
                reshard()
        for restore in restores:
            restore()


def _keep_attributes(module: nn.Module, seen: set[int]) -> Restore:
    attributes = dict(vars(module))
    inner = [_keep(value, seen) for value in attributes.values()]

    def restore() -> None:
        now = vars(module)
        for name in [name for name in now if name not in attributes]:
            del now[name]
        now.update(attributes)
        for restore_value in inner:
            restore_value()

    return restore


def _keep(value: Any, seen: set[int]) -> Restore:
    """Remember the contents of builtin containers, and those within them, and of tensors and random generators."""
    if isinstance(value, Tensor):
        return _keep_tensor(value, seen)
    if is_generator(value):
        return keep_generator(value)
    if type(value).__module__ not in ("builtins", "collections") or id(value) in seen:
        return _nothing
    if not isinstance(value, (list, deque, dict, set)):
        return _nothing
    seen.add(id(value))
    copy = value.copy()
    members = list(copy.values()) if isinstance(copy, dict) else list(copy)
    inner = [_keep(member, seen) for member in members if not isinstance(member, Tensor)]

    def restore() -> None:
        value.clear()
        if isinstance(value, (list, deque)):
            value.extend(copy)
        else:
            value.update(copy)
        for restore_member in inner:
            restore_member()

    return restore


def _keep_tensor(tensor: Tensor, seen: set[int]) -> Restore:
    if id(tensor) in seen or is_lazy(tensor) or tensor.is_inference():
        return _nothing
    seen.add(id(tensor))
    copy = tensor.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            tensor.copy_(copy)

    return restore


def _nothing() -> None:
    pass
