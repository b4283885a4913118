"""The export of the best checkpoint, at the end of a fit."""

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_qinit import _trainer
from lightning_qinit.export.extra import require
from lightning_qinit.export.fold import check_foldable
from lightning_qinit.export.integers import save_integers
from lightning_qinit.export.onnx import check_float32, check_inputs, export_onnx
from lightning_qinit.export.operators import translations


def check_path(path: str | Path | None) -> Path | None:
    """The path, or ``ValueError`` if its ending stands for no format."""
    if path is not None and Path(str(path)).suffix not in (".onnx", ".safetensors"):
        raise ValueError(f"`export` must be a path that ends in '.onnx' or '.safetensors', got {str(path)!r}.")
    return None if path is None else Path(path)


def check_can_export(trainer: Trainer, module: LightningModule, path: Path) -> None:
    """Raise, before anything is trained, if the export at the end would fail for what is known by now."""
    if path.suffix == ".safetensors":
        require("safetensors.torch")
    else:
        translations()
        if module.example_input_array is None:
            raise MisconfigurationException(
                f"`export` = '{path}' needs `example_input_array` in {type(module).__name__}: what its `forward` is "
                "called with."
            )
    if _trainer.restores_late(trainer):
        raise MisconfigurationException(
            "`export` cannot read the checkpoints of strategies that shard the module: export after the run."
        )


def check_calibrated(module: LightningModule, path: Path) -> None:
    """The same, once quantizers are calibrated: ``ValueError``, naming the layer, if one cannot be exported."""
    check_foldable(module)
    if path.suffix == ".onnx":
        check_inputs(module)
        check_float32(module)


def export_best(trainer: Trainer, module: LightningModule, path: Path) -> None:
    """Write the export of the best checkpoint, or of the module as it is if the trainer kept none; on a copy."""
    exported = copy.deepcopy(module).cpu()
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best:
        # this run wrote it, with whatever hyperparameters the module saves, and wherever
        checkpoint = trainer.strategy.load_checkpoint(best, weights_only=False)
        exported.on_load_checkpoint(checkpoint)
        exported.load_state_dict(checkpoint["state_dict"], strict=exported.strict_loading)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_integers(exported, path)
        return
    sample: Any = apply_to_collection(exported.example_input_array, torch.Tensor, lambda x: x.cpu())
    export_onnx(exported, sample, path)
