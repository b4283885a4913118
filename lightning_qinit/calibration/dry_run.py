"""Run a LightningModule's training step without a trace."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_qinit._trainer import isolate_rng


@contextmanager
def dry_run(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """While open, ``training_step`` computes and leaves nothing behind.

    Modules are in eval mode (BatchNorm statistics stand still, dropout is off) and gradients are off. What the step
    logs goes nowhere, optimizers and schedulers do not step. Afterwards every parameter, buffer, attribute and
    container of the modules (metric states and lists of outputs among them) and every random state is as before,
    also if the step raised. A module may define ``calibration_step(batch, batch_idx)`` to be run instead.
    """
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(_restored(module))
        stack.enter_context(_silenced(trainer, module))
        stack.enter_context(torch.no_grad())
        module.eval()
        yield


@contextmanager
def _silenced(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    idle: dict[str, Any] = dict.fromkeys(
        ("log", "log_dict", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients"), nothing
    )
    optimizers, lr_schedulers = module.optimizers, module.lr_schedulers
    idle["optimizers"] = lambda *args, **kwargs: _each(optimizers(*args, **kwargs), _Idle)
    idle["lr_schedulers"] = lambda: _each(lr_schedulers(), _Idle)
    if callable(step := getattr(module, "calibration_step", None)):
        idle["training_step"] = step
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    before = {name: vars(module)[name] for name in idle if name in vars(module)}
    vars(module).update(idle)
    try:
        yield
    finally:
        for name in idle:
            vars(module).pop(name, None)
        vars(module).update(before)
        trainer.loggers = loggers


def _each(one_or_many: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(one_or_many, list):
        return [function(item) for item in one_or_many]
    return None if one_or_many is None else function(one_or_many)


class _Idle:
    """An optimizer or scheduler whose state can be read and that never steps."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        return closure() if callable(closure) else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        pass

    def toggle_model(self, *args: Any, **kwargs: Any) -> Any:
        return nullcontext()


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Put back the tensors and attributes of a module and all below it."""
    restores: list[Callable[[], None]] = []
    seen: set[int] = set()
    for child in module.modules():
        restores.append(_keep_attributes(child, seen))
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is not None:
                restores.append(_keep_tensor(tensor, seen))
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _keep_attributes(module: nn.Module, seen: set[int]) -> Callable[[], None]:
    attributes = dict(vars(module))
    inner = [_keep(value, seen) for value in attributes.values()]

    def restore() -> None:
        now = vars(module)
        for name in [name for name in now if name not in attributes]:
            del now[name]
        now.update(attributes)
        _call_all(inner)

    return restore


def _keep(value: Any, seen: set[int]) -> Callable[[], None]:
    """Remember the contents of builtin containers, and those within them, and of tensors held as attributes."""
    if isinstance(value, Tensor):
        return _keep_tensor(value, seen)
    if type(value).__module__ not in ("builtins", "collections") or id(value) in seen:
        return _nothing
    seen.add(id(value))
    if isinstance(value, (list, deque)):
        items = list(value)
        inner = [_keep(item, seen) for item in items if not isinstance(item, Tensor)]

        def restore() -> None:
            value.clear()
            value.extend(items)
            _call_all(inner)

        return restore
    if isinstance(value, (dict, set)):
        copy = value.copy()
        members = list(copy.values()) if isinstance(copy, dict) else []
        inner = [_keep(member, seen) for member in members if not isinstance(member, Tensor)]

        def restore_mapping() -> None:
            value.clear()
            value.update(copy)
            _call_all(inner)

        return restore_mapping
    return _nothing


def _keep_tensor(tensor: Tensor, seen: set[int]) -> Callable[[], None]:
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


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()
