"""Bring what was measured to where a user looks: terminal, files, loggers."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from tqdm.auto import tqdm

from lightning_qinit._trainer import is_a, restores_late, uses_rich
from lightning_qinit.calibration import Observation, Start
from lightning_qinit.calibration.data import CalibrationData
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers import Initial
from lightning_qinit.insertion import named_quantizers, quantized_layers
from lightning_qinit.monitoring import tensorboard
from lightning_qinit.monitoring.figures import draw, enough
from lightning_qinit.monitoring.monitor import Monitor, channels, subsample
from lightning_qinit.monitoring.report import (
    ReportRow,
    format_report,
    markdown_report,
    remarks,
    rich_report,
    write_report,
)


def worst(rows: Sequence[ReportRow], most: int) -> list[str]:
    """Names of the quantizers that lose most, at most so many."""
    return [row.name for row in sorted(rows, key=lambda row: -row.error)[:most]]


def publish_report(
    trainer: Trainer, rows: Sequence[ReportRow], unseen: Sequence[str], left_float: Sequence[str], printed: bool
) -> None:
    """Print the report, write it beside the run's logs, and give it to the loggers. On rank zero."""
    if not trainer.is_global_zero:
        return
    if printed and uses_rich(trainer):
        from rich.console import Console  # Lightning's rich callbacks are in use, so it is there

        console = Console()
        console.print(rich_report(rows))
        console.print("\n".join(remarks(rows, unseen, left_float)), markup=False, highlight=False)
    elif printed:
        tqdm.write(format_report(rows, unseen, left_float))  # leaves an open progress bar in one piece
    if (folder := _log_folder(trainer)) is not None:
        write_report(rows, folder)
    tensorboard.add_report(tensorboard.writers(trainer), rows, "\n\n".join(remarks(rows, unseen, left_float)))
    logger: Any  # what these two have beyond any logger
    for logger in trainer.loggers:
        if is_a(logger, "WandbLogger"):
            columns = ["quantizer", "bits", "step", "error", "clipped"]
            data = [[row.name, row.bits, row.step, row.error, row.clipped] for row in rows]
            logger.log_table("quantization", columns=columns, data=data)
        if is_a(logger, "MLFlowLogger"):
            logger.experiment.log_text(logger.run_id, markdown_report(rows), "quantization.md")


def _log_folder(trainer: Trainer) -> str | None:
    """Where the run's logs are, as ``ModelCheckpoint`` sees it; ``None`` without a logger that has a folder.

    (``trainer.log_dir`` is one folder for all runs with some loggers, and every rank would have to ask for it.)
    """
    for logger in trainer.loggers:
        if (own := getattr(logger, "log_dir", None)) is not None:
            return str(own)
        if logger.save_dir is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return os.path.join(logger.save_dir, str(logger.name), version)
    return None


def publish_start_figures(
    trainer: Trainer, module: LightningModule, starts: Sequence[Start], seen: Observation, names: Sequence[str]
) -> None:
    """Draw the named quantizers on the data that their steps were chosen for."""
    writers = _figure_writers(trainer, names)
    calibration = CalibrationData(quantized_layers(module), seen)
    for start in starts if writers else ():
        if start.name in names and (data := calibration.of(start.name)) is not None:
            levels = start.quantizer.level_set(start.bits, start.signed)
            _add_figure(writers, f"quant_start/{start.name}", data.sample, levels, Initial(start.step, start.offset), 0)


def publish_end_figures(
    trainer: Trainer, module: LightningModule, monitor: Monitor, names: Sequence[str], step: int
) -> None:
    """Draw the named quantizers as they are now: weights, and the inputs of the last logging step."""
    writers = _figure_writers(trainer, names)
    layers = quantized_layers(module)
    quantizers = named_quantizers(layers)
    for name in names if writers else ():
        if (quantizer := quantizers.get(name)) is None:  # a layer that was replaced on the way
            continue
        layer, _, what = name.rpartition(".")
        weights = layers[layer].weights()
        if what in weights:
            values = subsample(quantizer.transform(weights[what].detach().float()), quantizer)
        elif name in monitor.kept:
            values = monitor.kept[name]
        else:
            continue
        steps = quantizer.step.detach().double()
        chosen = steps if len(steps) == 1 else steps[channels(len(steps)).to(steps.device)]
        offset = None if quantizer.offset is None else quantizer.offset.detach().double()
        sample = Sample.of_tensor(values, 0)
        _add_figure(writers, f"quant_end/{name}", sample, quantizer.levels, Initial(chosen, offset), step)


def _figure_writers(trainer: Trainer, names: Sequence[str]) -> list[Any]:
    # a strategy that shards weights gathers them on all ranks or on none
    found = [] if not names or restores_late(trainer) else tensorboard.writers(trainer)
    if found and find_spec("matplotlib") is None:
        rank_zero_warn("No figures of quantizers are drawn, since Matplotlib is not installed (`log_figures=0`: none).")
        return []
    return found


def _add_figure(writers: list[Any], tag: str, sample: Sample, levels: Any, chosen: Initial, step: int) -> None:
    tensorboard.add_figure(writers, tag, lambda: draw(tag.partition("/")[2], *enough(sample, chosen), levels), step)
