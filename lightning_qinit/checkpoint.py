"""Checkpoints of quantized modules: what they were trained with, and how they are loaded."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_qinit.batchnorm import fold_alike
from lightning_qinit.checks import shorten
from lightning_qinit.config import QuantConfig, plain
from lightning_qinit.insertion import insert, quantized_layers
from lightning_qinit.quantizers import Quantizer

STATE_KEY = "QuantInitCallback"
T = TypeVar("T", bound=LightningModule)


def restore(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Insert the quantizers that a checkpoint was trained with, so that its state dict loads strictly.

    BatchNorm that was folded before training (:func:`~lightning_qinit.fold_batchnorm`) is folded here too.

    For a module's own ``on_load_checkpoint``, which Lightning calls before it loads the weights::

        def on_load_checkpoint(self, checkpoint):
            lightning_qinit.restore(self, checkpoint)

    A checkpoint of a float module changes nothing. Without a Trainer, and through one with the callback, too.

    Args:
        module: the module that the checkpoint is going to be loaded into.
        checkpoint: the loaded checkpoint.

    Raises:
        ValueError: if the checkpoint holds quantizers but not their settings (``save_weights_only=True``).
    """
    state = checkpoint.get("state_dict", {})  # left out by strategies that shard the module
    fold_alike(module, state)
    settings = saved_settings(checkpoint)
    if settings is not None:
        insert(module, QuantConfig.from_plain(settings))
    elif has_quantizers(state) and not quantized_layers(module):
        raise ValueError(
            "The checkpoint holds quantizers but not their settings, since it was saved with `save_weights_only=True`: "
            "call `lightning_qinit.prepare(module, ...)` with the settings of the run, then `load_state_dict`."
        )
    warn_of_missing(module, state)


def load_from_checkpoint(module_class: type[T], checkpoint_path: str | Path, **kwargs: Any) -> T:
    """``module_class.load_from_checkpoint`` for a quantized checkpoint: strictly, with all quantizers in use.

    Args:
        module_class: the class of the module; it needs no change.
        checkpoint_path: what the Trainer saved.
        **kwargs: as of ``LightningModule.load_from_checkpoint``.

    Returns:
        The module as it was trained, quantized.
    """

    of_class = module_class.on_load_checkpoint

    def on_load_checkpoint(self: T, checkpoint: dict[str, Any]) -> None:
        of_class(self, checkpoint)  # first, since it may change the state
        restore(self, checkpoint)

    # Lightning calls the hook between building the module and loading its weights; a subclass would be registered where
    # a module keeps a list of them
    with patch.object(module_class, "on_load_checkpoint", on_load_checkpoint):
        return module_class.load_from_checkpoint(checkpoint_path, **kwargs)


def saved_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of the callback that trained a checkpoint, if it holds them."""
    states = checkpoint.get("callbacks") or {}
    return next((state for key, state in states.items() if key.split("{")[0] == STATE_KEY), None)


def has_quantizers(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds the state of quantizers."""
    ours = re.compile(r"(^|\.)(weight|input)_quantizer\.(\w+\.)?relative_step$")
    return any(ours.search(key) for key in state)


def warn_of_missing(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Name the quantizers of which a state dict with quantizers holds nothing: they would stay in float unnoticed."""
    names = [name for name, child in module.named_modules() if isinstance(child, Quantizer) and not child.is_calibrated]
    missing = [name for name in names if f"{name}.relative_step" not in state]
    if missing and has_quantizers(state):
        rank_zero_warn(
            f"The checkpoint holds no state of {shorten(missing)}, which stay in float: keep the keys with `quantizer` "
            f"in them in the `state_dict` of {type(module).__name__}."
        )


def differences(settings: Mapping[str, Any], config: QuantConfig) -> list[str]:
    """In what the settings of a checkpoint differ from those at hand; initializers may."""
    return [
        f"{key}: {settings[key]!r} in the checkpoint, {value!r} in the callback"
        for key, value in plain(config).items()
        if not key.endswith("initializer")
        and key in settings
        and _without_initializers(settings[key]) != _without_initializers(value)
    ]


def _without_initializers(value: Any) -> Any:
    """The same without the initializers in ``overrides``."""
    if not isinstance(value, Mapping):
        return value
    return {key: _without_initializers(item) for key, item in value.items() if not key.endswith("initializer")}
