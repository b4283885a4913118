"""Put a module back as it was, whatever ran in between."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_qinit.generators import is_generator, keep_generator

Restore = Callable[[], object]


CONTAINERS: tuple[type, ...] = (OrderedDict, dict, list, deque, set)


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Afterwards every parameter, buffer, attribute and container of a module and all below it is as before."""
    seen: set[int] = set()
    restores = [_keep(child, seen) for child in module.modules()]
    try:
        yield
    finally:
        for child in module.modules():
            if callable(reshard := getattr(child, "reshard", None)):  # FSDP2 may still hold whole parameters
                reshard()
        for restore in restores:
            restore()


def _keep(value: Any, seen: set[int]) -> Restore:
    """Remember what is in modules and containers, and in those within them, in tensors, arrays and generators."""
    if isinstance(value, Tensor):
        return _keep_tensor(value, seen)
    if is_generator(value):
        return keep_generator(value)
    if id(value) in seen:
        return _nothing
    if isinstance(value, nn.Module):
        seen.add(id(value))
        return _keep_module(value, seen)
    if isinstance(value, tuple):
        seen.add(id(value))
        inner = [_keep(member, seen) for member in value if not isinstance(member, Tensor)]
        return lambda: [restore() for restore in inner]
    if isinstance(value, np.ndarray) and value.flags.writeable and not isinstance(value, np.memmap):
        return partial(np.copyto, value, value.copy())
    kind = next((kind for kind in CONTAINERS if isinstance(value, kind)), None)
    if kind is None:
        return _nothing
    seen.add(id(value))
    return _keep_container(value, kind, seen)


def _keep_module(module: nn.Module, seen: set[int]) -> Restore:
    attributes, training = dict(vars(module)), getattr(module, "training", None)  # frozen TorchScript has none
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    inner = [_keep(value, seen) for value in (*attributes.values(), *tensors)]

    def restore() -> None:
        now = vars(module)
        for name in [name for name in now if name not in attributes]:
            del now[name]
        now.update(attributes)
        if getattr(module, "training", None) is not training:  # TorchScript keeps it elsewhere
            module.training = bool(training)
        for restore_value in inner:
            restore_value()

    return restore


def _keep_container(value: Any, kind: Any, seen: set[int]) -> Restore:
    # by the methods of the builtin type: a class of its own may do more, or refuse
    copy = kind(value) if kind is not OrderedDict else list(OrderedDict.items(value))
    members = dict(copy).values() if issubclass(kind, dict) else copy
    inner = [_keep(member, seen) for member in members if not isinstance(member, Tensor)]

    def restore() -> None:
        kind.clear(value)
        if kind in (list, deque):
            kind.extend(value, copy)
        else:
            kind.update(value, copy)
        for restore_member in inner:
            restore_member()

    return restore


def _keep_tensor(tensor: Tensor, seen: set[int]) -> Restore:
    if id(tensor) in seen or is_lazy(tensor) or tensor.is_inference():
        return _nothing
    strided = tensor.layout == torch.strided and not tensor.is_nested
    if strided and 0 in [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]:
        return _nothing  # expanded: nothing can be written to it
    seen.add(id(tensor))
    copy = tensor.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            tensor.copy_(copy)

    return restore


def _nothing() -> None:
    pass
