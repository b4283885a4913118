"""What would go wrong later without a word, refused while a stage is set up."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_qinit import _trainer
from lightning_qinit.batchnorm import fold_alike
from lightning_qinit.checkpoint import differences, has_quantizers, saved_settings, warn_of_missing
from lightning_qinit.config import QuantConfig
from lightning_qinit.insertion import quantized_layers


def check_launch(trainer: Trainer, module: LightningModule) -> None:
    """A process that was spawned trains a copy of the module: what is inserted there is in that copy alone."""
    if _trainer.spawns(trainer) and not quantized_layers(module):
        raise MisconfigurationException(
            "This strategy trains copies of the module in processes of their own, and the module at hand would "
            "never see their quantizers: call `lightning_qinit.prepare(module, ...)` with the same settings before "
            '`fit`, or use `strategy="ddp"`.'
        )


def check_order(callback: Callback, trainer: Trainer) -> None:
    """Averaging callbacks copy the module when they are set up; finetuning ones set groups when fit starts."""
    order = _trainer.callbacks(trainer)
    copying = "copies the module before this callback has inserted quantizers"
    grouping = "puts back the parameter groups of a resumed run, without those of steps that this callback has made"
    for others, why, place in (
        (_trainer.averaging_callbacks(trainer), copying, "before"),
        (_trainer.finetuning_callbacks(trainer), grouping, "after"),
    ):
        for other in others:
            if (order.index(callback) < order.index(other)) != (place == "before"):
                name = type(other).__name__
                raise MisconfigurationException(
                    f"`{name}` {why}: put QuantInitCallback {place} {name} in `Trainer(callbacks=[...])`."
                )


def check_copies(trainer: Trainer, module: LightningModule) -> None:
    """Averaging callbacks copy the module when they are set up: layers built later are in no copy."""
    for other in _trainer.averaging_callbacks(trainer):
        too_early = _trainer.overrides(module, "setup") or not _trainer.configures(other)
        if too_early and not quantized_layers(module):
            raise MisconfigurationException(
                f"`{type(other).__name__}` copies {type(module).__name__} before its `setup` or `configure_model` "
                "has built layers, and would average none: build them in `__init__`."
            )


def check_settings(settings: Mapping[str, Any], config: QuantConfig) -> None:
    """The settings of a checkpoint must be those at hand; initializers may differ."""
    found = differences(settings, config)
    if found:
        raise MisconfigurationException(
            "The checkpoint was trained with other quantization settings: " + "; ".join(found) + "."
        )


def check_before_loading(trainer: Trainer, module: LightningModule, config: QuantConfig) -> None:
    """Refuse a checkpoint that does not fit before its weights are loaded, where torch would name keys only.

    In the module's ``on_load_checkpoint``, until :func:`stop_checking`.
    """
    on_load_checkpoint, own = module.on_load_checkpoint, vars(module).get("on_load_checkpoint")

    def check_then_load(checkpoint: dict[str, Any]) -> None:
        settings = saved_settings(checkpoint)
        if settings is not None:
            check_settings(settings, config)
        state = checkpoint.get("state_dict")  # strategies that shard the module have loaded it by now, and left it out
        if state is not None:
            if trainer.state.fn == "fit" and checkpoint.get("optimizer_states") and not has_quantizers(state):
                raise MisconfigurationException(
                    "The checkpoint is one of a float module, whose optimizer knows no steps: load its weights "
                    "(`Module.load_from_checkpoint(path)`) and call `fit` without `ckpt_path`."
                )
            fold_alike(module, state)
        on_load_checkpoint(checkpoint)
        warn_of_missing(module, checkpoint.get("state_dict", {}))  # which the module may have changed

    vars(check_then_load)["instead_of"] = own
    vars(module)["on_load_checkpoint"] = check_then_load


def stop_checking(trainer: Trainer, module: LightningModule) -> None:
    """The checkpoint is loaded, and a module that holds a local function cannot be pickled."""
    for each in (module, *_trainer.averaged_modules(trainer)):  # copies made since `setup` hold it too
        put_back(each, "on_load_checkpoint")


def put_back(module: nn.Module, hook: str) -> None:
    """Undo what was put in the place of a module's hook: one that the user has set on the module itself returns."""
    ours = vars(module).get(hook)
    if "instead_of" in getattr(ours, "__dict__", {}):
        own = vars(vars(module).pop(hook))["instead_of"]
        if own is not None:
            vars(module)[hook] = own
