"""The calibration pass of a Trainer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm

from lightning_qinit._trainer import pulls_batches_itself, restores_late, run_step, training_batches
from lightning_qinit.calibration.batchnorm import Statistics, trained_norms
from lightning_qinit.calibration.config import CalibrationConfig
from lightning_qinit.calibration.dry_run import dry_run
from lightning_qinit.calibration.observe import Observation
from lightning_qinit.calibration.passes import Passes, copied
from lightning_qinit.calibration.sketch import Sketch
from lightning_qinit.calibration.start import Start
from lightning_qinit.functional.sample import float64_device
from lightning_qinit.insertion import QuantizedLayer


class StepError(RuntimeError):
    """The module's step raised in calibration, on this rank or on another; all ranks know, so it can be tried again."""


def choose_in_training(
    trainer: Trainer,
    module: LightningModule,
    layers: Mapping[str, QuantizedLayer],
    config: CalibrationConfig,
    given: Sequence[Any] | None = None,
) -> tuple[list[Start], Observation, Statistics]:
    """Run the module's step on the first training batches without a trace, and choose where quantizers start.

    Args:
        trainer: a trainer that is about to fit.
        module: its module.
        layers: the layers to start.
        config: how to calibrate.
        given: the batches, for data that cannot be read ahead; ``None`` reads them.

    Raises:
        MisconfigurationException: if ``training_step`` takes the loader's iterator and there is no
            ``calibration_step``.
        StepError: if the step raised, on all ranks; the module is as before then.
        RuntimeError: if it raised on this rank, and the strategy shards parameters.
    """
    if pulls_batches_itself(module) and not hasattr(module, "calibration_step"):
        raise MisconfigurationException(
            f"`{type(module).__name__}.training_step` takes `dataloader_iter`, which calibration cannot feed: define "
            "`calibration_step(batch, batch_idx)` in the module."
        )
    norms = trained_norms(module)
    with dry_run(trainer, module) as losses, _batches(trainer, config.batches, given) as batches:

        def step(batch: Any, index: int) -> list[Tensor]:
            losses.clear()
            output = _step(trainer, module, batch, index)
            loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
            return losses + ([loss] if isinstance(loss, Tensor) else [])

        passes = Passes(batches, step, _step_name(module), lambda some, seen: _over_ranks(trainer, some, seen))
        starts, seen, statistics = passes.choose(layers, config, norms)
        _agree(trainer, _step_name(module))
        if trainer.world_size > 1:  # the same already but for rounding; exactly the same from here on
            strategy = trainer.strategy
            chosen = strategy.broadcast([start.chosen() for start in starts])
            starts = [start.at(*values) for start, values in zip(starts, chosen, strict=True)]
            statistics = [(norm, *_average(trainer, *values)) for norm, *values in statistics]
    return starts, seen, statistics


def _average(trainer: Trainer, mean: Tensor, variance: Tensor, batches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over all ranks, weighted by batches; every rank takes part, whether a layer ran there or not."""
    total = trainer.strategy.reduce(batches.to(mean), reduce_op="sum")
    sums = trainer.strategy.reduce(torch.stack((mean, variance)) * batches.to(mean), reduce_op="sum")
    mean, variance = sums / total.clamp(min=1)
    return mean, variance, total


@contextmanager
def _batches(trainer: Trainer, most: int, given: Sequence[Any] | None) -> Iterator[Any]:
    if given is not None:
        yield map(copied, given)  # training takes the same ones next
        return
    here = math.ceil(most / trainer.world_size)
    shown = trainer.is_global_zero and getattr(trainer.progress_bar_callback, "is_enabled", False)
    with training_batches(trainer, here) as batches:
        yield tqdm(batches, total=here, desc="Calibrating", leave=False, dynamic_ncols=True, disable=not shown)


def _step(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Any:
    try:
        return run_step(trainer, batch, batch_idx)
    except Exception as error:
        message = (
            f"`{_step_name(module)}` raised {type(error).__name__} on calibration batch {batch_idx}: "
            f"{error} (It runs without gradients and in eval mode; where it cannot, define "
            "`calibration_step(batch, batch_idx)`, which calls the layers and computes no loss.)"
        )
        if restores_late(trainer):  # parameters are sharded: the other ranks may be waiting within the step
            raise RuntimeError(message) from error
        trainer.strategy.reduce_boolean_decision(False)
        raise StepError(message) from error


def _agree(trainer: Trainer, step: str) -> None:
    """Wait for all ranks; one whose step raised is not going to take part in what comes next."""
    if not trainer.strategy.reduce_boolean_decision(True):
        raise StepError(f"`{step}` raised on another rank in calibration.")


def _step_name(module: LightningModule) -> str:
    return f"{type(module).__name__}.{'calibration_step' if hasattr(module, 'calibration_step') else 'training_step'}"


def _over_ranks(trainer: Trainer, layers: Mapping[str, QuantizedLayer], observation: Observation) -> Observation:
    """Add the data of all ranks; the order of layers is that of rank zero, then of those that ran elsewhere."""
    if trainer.world_size == 1:
        return observation
    strategy = trainer.strategy
    _agree(trainer, _step_name(trainer.lightning_module))
    ranks, own = range(trainer.world_size), (observation.first_run, observation.last_run)
    orders = [strategy.broadcast(own, src=rank) for rank in ranks]  # a layer may run on some ranks only
    observation.first_run = list(dict.fromkeys(name for first, _ in orders for name in first))
    observation.last_run = next((last for _, last in orders if last is not None), None)
    for name, layer in layers.items():  # a rank that did not run a layer still takes part in its sum
        for what, quantizer in layer.input_quantizers().items():
            device = float64_device(quantizer.initial_step)
            kinds: Sequence[tuple[dict[str, Sketch], bool]] = [(observation.inputs, False)]
            if observation.criterion == "fisher":
                kinds = [*kinds, (observation.input_importance, True)]
            for sketches, weighted in kinds:
                sketch = sketches.setdefault(f"{name}.{what}", Sketch(device, weighted))
                sketch.table = strategy.reduce(sketch.table, reduce_op="sum")
                sketch.extremes = strategy.reduce(sketch.extremes, reduce_op="max")
        if observation.criterion == "output":
            device = float64_device(next(layer.parameters()))
            for what in layer.float_inputs():
                zeros = torch.zeros(3, dtype=torch.float64, device=device)
                moments = observation.moments.get(f"{name}.{what}", zeros)
                observation.moments[f"{name}.{what}"] = strategy.reduce(moments, reduce_op="sum")
        if observation.criterion in ("fisher", "hessian"):
            for what, weight in layer.weights().items():
                zeros = torch.zeros(weight.shape, dtype=torch.float64, device=float64_device(weight))
                importance = observation.weight_importance.get(f"{name}.{what}", zeros)
                observation.weight_importance[f"{name}.{what}"] = strategy.reduce(importance, reduce_op="sum")
    return observation
