"""Run a LightningModule's training step without a trace."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qinit._trainer import isolate_rng, schedulers
from lightning_qinit.calibration.mode import calibration_mode
from lightning_qinit.calibration.mute import mute
from lightning_qinit.calibration.restore import restored
from lightning_qinit.insertion import held_schedulers


@contextmanager
def dry_run(trainer: Trainer, module: LightningModule) -> Iterator[list[Tensor]]:
    """While open, ``training_step`` computes and leaves nothing behind.

    Modules are in :func:`calibration_mode` and gradients are off. What the step logs goes nowhere, optimizers and
    schedulers (also those that the module keeps for itself) do not step. Afterwards every parameter, buffer, attribute
    and container of the modules (metric states and lists of outputs among them), every setting of the optimizers, every
    random state and whether the trainer is to stop are as before, also if the step raised. A module may define
    ``calibration_step(batch, batch_idx)`` to be run instead.

    Gives the list that losses passed to ``manual_backward`` are added to.
    """
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(restored(module))
        losses: list[Tensor] = []
        stack.enter_context(_silent(trainer))
        for child in module.modules():
            if isinstance(child, LightningModule):  # one inside another may optimize by hand as well
                stack.enter_context(_idle(child, losses))
        for scheduler in (*held_schedulers(module), *schedulers(trainer)):
            stack.enter_context(_replaced(scheduler, {"step": _nothing}))
        if callable(step := getattr(module, "calibration_step", None)):
            stack.enter_context(_replaced(module, {"training_step": step}))
        stack.enter_context(torch.no_grad())
        calibration_mode(module)
        yield losses


@contextmanager
def _silent(trainer: Trainer) -> Iterator[None]:
    """Nothing is logged, and a step that asks to stop, or sets a learning rate, does not do so to the run."""
    loggers, should_stop, stage = trainer.loggers, trainer.should_stop, trainer.state.stage
    trainer.training = True  # also where a sanity check comes first
    groups = [(group, dict(group)) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    trainer.loggers = [mute(logger) for logger in loggers]
    try:
        yield
    finally:
        trainer.loggers, trainer.should_stop, trainer.state.stage = loggers, should_stop, stage
        for group, settings in groups:
            group.update(settings)


def _idle(module: LightningModule, losses: list[Tensor]) -> AbstractContextManager[None]:
    """A module whose logs and optimizers do nothing."""

    idle: dict[str, Any] = dict.fromkeys(
        ("log", "log_dict", "toggle_optimizer", "untoggle_optimizer", "clip_gradients"), _nothing
    )
    # partial, as no lambda: workers may be started with a copy of the module, by pickle
    idle["manual_backward"] = partial(_add, losses)
    for name in ("optimizers", "lr_schedulers"):
        idle[name] = partial(_each, getattr(module, name))
    return _replaced(module, idle)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def _replaced(thing: Any, methods: dict[str, Any]) -> Iterator[None]:
    before = {name: vars(thing)[name] for name in methods if name in vars(thing)}
    vars(thing).update(methods)
    try:
        yield
    finally:
        for name in methods:
            vars(thing).pop(name, None)
        vars(thing).update(before)


def _add(losses: list[Any], loss: Any, *args: Any, **kwargs: Any) -> None:
    losses.append(loss)


def _each(get: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    one_or_many = get(*args, **kwargs)
    if isinstance(one_or_many, list):
        return [_Idle(item) for item in one_or_many]
    return None if one_or_many is None else _Idle(one_or_many)


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
