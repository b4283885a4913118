"""What TensorBoard shows beside scalars."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

from lightning_qinit._trainer import is_a
from lightning_qinit.monitoring.monitor import Monitor
from lightning_qinit.monitoring.quantities import PREFIXES
from lightning_qinit.monitoring.report import ReportRow, markdown_report


def loggers(trainer: Trainer) -> list[Any]:
    """A trainer's TensorBoard loggers, of either Lightning package."""
    return [logger for logger in trainer.loggers if is_a(logger, "TensorBoardLogger")]


def writers(trainer: Trainer) -> list[Any]:
    """Their writers, on rank zero."""
    return [logger.experiment for logger in loggers(trainer)] if trainer.is_global_zero else []


def add_layout(writers: Sequence[Any], monitor: Monitor) -> None:
    """One chart per quantity over all quantizers, under Custom Scalars."""
    offsets = any(quantizer.has_offset for quantizer in monitor.quantizers.values())
    shown = [PREFIXES[quantity] for quantity in monitor.quantities if quantity != "offset" or offsets]
    layout = {"all": {"mean and worst error": ["Multiline", ["quant_error/mean", "quant_error/max"]]}}
    for role in ("weights", "inputs"):
        held = [name for name, q in monitor.quantizers.items() if (q.batch_axis is None) == (role == "weights")]
        if ends := "|".join(sorted({name.rpartition(".")[2] for name in held})):
            layout[role] = {prefix: ["Multiline", [rf"{prefix}/.*\.({ends})$"]] for prefix in shown}
    for writer in writers:
        writer.add_custom_scalars(layout)


def add_report(writers: Sequence[Any], rows: Sequence[ReportRow], notes: str) -> None:
    """The report as a rendered table, under Text."""
    for writer in writers:
        writer.add_text("quantization", markdown_report(rows) + "\n\n" + notes, 0)


def add_codes(writers: Sequence[Any], monitor: Monitor, names: Sequence[str], step: int) -> None:
    """How many values each level of the named quantizers has, as histograms over time."""
    for name in names if writers else ():
        count = monitor.counts.get(name)
        if count is None:
            continue
        level = monitor.quantizers[name].levels.tolist()
        used = count[: len(level)].tolist()
        if sum(used) == 0:
            continue
        middles = [(a + b) / 2 for a, b in zip(level, level[1:], strict=False)]
        limits = [*middles, level[-1] + (level[-1] - level[-2]) / 2]
        for writer in writers:
            writer.add_histogram_raw(
                f"quant_codes/{name}",
                min=level[0] - (level[1] - level[0]) / 2,  # bars as wide as the others, so as high as they count
                max=limits[-1],
                num=sum(used),
                sum=sum(c * n for c, n in zip(level, used, strict=True)),
                sum_squares=sum(c * c * n for c, n in zip(level, used, strict=True)),
                bucket_limits=limits,
                bucket_counts=used,
                global_step=step,
            )


def add_figure(writers: Sequence[Any], tag: str, draw: Callable[[], Any], step: int) -> None:
    """A figure, drawn only if there is a writer for it."""
    if writers:
        figure = draw()
        for writer in writers:
            writer.add_figure(tag, figure, step, close=False)


def add_hparams(trainer: Trainer, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Settings and final errors under HParams, beside the module's own hyperparameters."""
    shown = {f"quant/{key}": value if _is_plain(value) else str(value) for key, value in settings.items()}
    for logger in loggers(trainer):
        logger.log_hyperparams(shown, dict(metrics))


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))
