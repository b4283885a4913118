"""The calibration pass of a Trainer."""

import math
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from tqdm.auto import tqdm

from lightning_qinit._trainer import pulls_batches_itself, run_step, training_batches
from lightning_qinit.calibration.dry_run import dry_run
from lightning_qinit.calibration.observe import Observation, observe
from lightning_qinit.calibration.sketch import Sketch
from lightning_qinit.functional.sample import float64_device
from lightning_qinit.insertion import QuantizedLayer


def observe_training(
    trainer: Trainer, module: LightningModule, layers: dict[str, QuantizedLayer], batches: int
) -> Observation:
    """Run the module's step on the first training batches without a trace, and watch the layers.

    Args:
        trainer: a trainer that is about to fit.
        module: its module.
        layers: the layers to watch.
        batches: how many batches, over all ranks together.

    Raises:
        MisconfigurationException: if ``training_step`` takes the loader's iterator and there is no
            ``calibration_step``.
        RuntimeError: if the step raised; the module is as before then.
    """
    _check_step(module)
    with dry_run(trainer, module), observe(layers) as observation:
        here = math.ceil(batches / trainer.world_size)
        with training_batches(trainer, here) as loader, _progress(trainer, here) as bar:
            for batch_idx, batch in enumerate(loader):
                _step(trainer, module, batch, batch_idx)
                observation.end_batch()
                bar.update()
    return _over_ranks(trainer, layers, observation)


def observe_batch(
    trainer: Trainer, module: LightningModule, layers: dict[str, QuantizedLayer], batch: Any
) -> Observation:
    """As :func:`observe_training`, on one batch at hand, for data that cannot be read ahead."""
    _check_step(module)
    with dry_run(trainer, module), observe(layers) as observation:
        _step(trainer, module, batch, 0)
    return _over_ranks(trainer, layers, observation)


def _check_step(module: LightningModule) -> None:
    if pulls_batches_itself(module) and not hasattr(module, "calibration_step"):
        raise MisconfigurationException(
            f"`{type(module).__name__}.training_step` takes `dataloader_iter`, which calibration cannot feed: define "
            "`calibration_step(batch, batch_idx)` in the module."
        )


def _step(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
    try:
        run_step(trainer, batch, batch_idx)
    except Exception as error:
        step = "calibration_step" if hasattr(module, "calibration_step") else "training_step"
        raise RuntimeError(
            f"`{type(module).__name__}.{step}` raised {type(error).__name__} on calibration batch {batch_idx}: "
            f"{error} (It runs without gradients and in eval mode; where it cannot, define "
            "`calibration_step(batch, batch_idx)`, which calls the layers and computes no loss.)"
        ) from error


def _progress(trainer: Trainer, total: int) -> "tqdm[None]":
    shown = trainer.is_global_zero and getattr(trainer.progress_bar_callback, "is_enabled", False)
    return tqdm(total=total, desc="Calibrating", leave=False, dynamic_ncols=True, disable=not shown)


def _over_ranks(trainer: Trainer, layers: dict[str, QuantizedLayer], observation: Observation) -> Observation:
    """Add the data of all ranks; the order of layers is that of rank zero."""
    if trainer.world_size == 1:
        return observation
    order = trainer.strategy.broadcast((observation.first_run, observation.last_run))
    observation.first_run, observation.last_run = order
    for name, layer in layers.items():  # a rank that did not run a layer still takes part in its sum
        if layer.input_quantizer is None:
            continue
        sketch = observation.inputs.setdefault(name, Sketch(float64_device(layer.input_quantizer.step)))
        sketch.table = trainer.strategy.reduce(sketch.table, reduce_op="sum")
        sketch.extremes = trainer.strategy.reduce(sketch.extremes, reduce_op="max")
    return observation
