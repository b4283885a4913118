"""The same without a Trainer: quantize and calibrate any ``torch.nn.Module``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qinit.calibration import (
    Passes,
    calibration_mode,
    restored,
    settle,
    trained_norms,
    warn_of,
)
from lightning_qinit.calibration.config import CalibrationConfig, Criterion
from lightning_qinit.config import SETTINGS, LayerConfig, QuantConfig
from lightning_qinit.insertion import insert, quantized_layers
from lightning_qinit.monitoring import ReportRow, make_row
from lightning_qinit.quantizers.kernels import Kernels, check_kernels


def prepare(
    module: nn.Module,
    skip: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    kernels: Kernels = "auto",
    **settings: Any,
) -> nn.Module:
    """Insert quantizers into a module, in place.

    Build the optimizer afterwards, so that it trains the steps: the parameters named ``relative_step`` and
    ``relative_offset``, which weight decay would pull to where it has no meaning.

    Args:
        module: any module.
        skip: glob patterns of layer names to leave in float.
        overrides: glob patterns of layer names to settings that differ there.
        kernels: whether quantizers run as kernels, as in :class:`~lightning_qinit.QuantInitCallback`.
        **settings: ``weight_bits``, ``activation_bits``, ``quantizer`` and ``initializer`` (also with ``weight_`` or
            ``activation_`` before them), ``per_channel`` and ``first_last_bits``, as in
            :class:`~lightning_qinit.QuantInitCallback`.

    Returns:
        The module.

    Raises:
        ValueError: if a setting is out of range, a pattern matches no layer, or there is nothing to quantize.
    """
    check_kernels(kernels)
    unknown = sorted(settings.keys() - set(SETTINGS))
    if unknown:
        raise ValueError(f"`prepare` has no settings {unknown}; those of layers are {sorted(SETTINGS)}.")
    config = QuantConfig(LayerConfig(**settings), skip=skip, overrides=overrides or {})
    insert(module, config, kernels=kernels)
    return module


def calibrate(
    module: nn.Module,
    batches: Iterable[Any],
    step: Callable[[nn.Module, Any], Any] | None = None,
    criterion: Criterion = "mse",
    sequential: bool = False,
    average_bits: float | None = None,
    recalibrate_batchnorm: bool = False,
) -> list[ReportRow]:
    """Start the steps of a prepared module at the least error on some batches.

    The module runs in eval mode, without gradients unless ``criterion`` is ``"fisher"`` (BatchNorm layers that were
    never trained use the statistics of the batch); its parameters, buffers and attributes are put back.

    Args:
        module: a module that went through :func:`prepare`.
        batches: whatever ``step`` takes.
        step: runs the module on a batch; ``None`` calls it with the batch, a tuple or list being its positional
            arguments and a mapping its keyword arguments. With ``criterion="fisher"`` it returns the loss.
        criterion: how the optimum weighs errors, as in :class:`~lightning_qinit.QuantInitCallback`.
        sequential: layer by layer, as there.
        average_bits: as there.
        recalibrate_batchnorm: as there.

    Returns:
        A row per quantizer: its step, its error and what other initializers would have cost. Layers that did not run,
        and inputs without a finite value, have none and stay in float, with a warning.

    Raises:
        ValueError: if the module has no quantizers, no batch runs them, or ``"fisher"`` finds no loss.
    """
    config = CalibrationConfig(
        criterion=criterion,
        sequential=sequential,
        average_bits=average_bits,
        recalibrate_batchnorm=recalibrate_batchnorm,
    )

    def run(batch: Any, index: int) -> list[Tensor]:
        output = (step or call)(module, batch)
        return [output] if isinstance(output, Tensor) else []

    layers = quantized_layers(module)
    if not layers:
        raise ValueError(f"{type(module).__name__} has no quantizers: call `prepare(module, ...)` first.")
    if criterion == "fisher" and step is None:
        raise ValueError("`criterion` = 'fisher' needs a `step` that returns the loss, got None.")
    norms = trained_norms(module)
    with torch.no_grad(), restored(module):
        calibration_mode(module)
        starts, seen, statistics = Passes(batches, run, "step").choose(layers, config, norms)
    if not seen.first_run:
        raise ValueError("`batches` must hold at least one batch that runs a quantized layer, got none.")
    settle(starts, statistics)
    warn_of(starts, layers, seen)
    return [make_row(start) for start in starts]


def call(module: nn.Module, batch: Any) -> Any:
    """The output of a module for a batch: a mapping of keyword arguments, a tuple or list of arguments, or the one."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)
