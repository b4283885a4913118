"""Run a LightningModule's training step without a trace."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from lightning_qinit._trainer import isolate_rng
from lightning_qinit.calibration.mode import calibration_mode
from lightning_qinit.calibration.restore import restored


@contextmanager
def dry_run(trainer: Trainer, module: LightningModule) -> Iterator[list[Tensor]]:
    """While open, ``training_step`` computes and leaves nothing behind.

    Modules are in :func:`calibration_mode` and gradients are off. What the step logs goes nowhere, optimizers and
    schedulers do not step. Afterwards every parameter, buffer, attribute and container of the modules (metric states
    and lists of outputs among them) and every random state is as before, also if the step raised. A module may define
    ``calibration_step(batch, batch_idx)`` to be run instead.

    Gives the list that losses passed to ``manual_backward`` are added to.
    """
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(restored(module))
        losses: list[Tensor] = []
        stack.enter_context(_silenced(trainer, module, losses))
        stack.enter_context(torch.no_grad())
        calibration_mode(module)
        yield losses


@contextmanager
def _silenced(trainer: Trainer, module: LightningModule, losses: list[Tensor]) -> Iterator[None]:
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    idle: dict[str, Any] = dict.fromkeys(
        ("log", "log_dict", "toggle_optimizer", "untoggle_optimizer", "clip_gradients"), nothing
    )
    idle["manual_backward"] = lambda loss, *args, **kwargs: losses.append(loss)
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
