"""The callback: one short method per hook, in the order in which Lightning calls them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qinit import _trainer
from lightning_qinit.calibration import settle, warn_of
from lightning_qinit.calibration.config import CalibrationConfig, Criterion
from lightning_qinit.calibration.run import StepError, choose_in_training
from lightning_qinit.calibration.widths import WIDTHS
from lightning_qinit.checkpoint import STATE_KEY
from lightning_qinit.checks import check, check_whole, is_number, shorten
from lightning_qinit.config import LayerConfig, QuantConfig, plain
from lightning_qinit.export.best import check_calibrated, check_can_export, check_path, export_best
from lightning_qinit.graph import reached_by
from lightning_qinit.guards import (
    check_before_loading,
    check_copies,
    check_launch,
    check_order,
    check_settings,
    put_back,
    stop_checking,
)
from lightning_qinit.initializers import Initializer
from lightning_qinit.insertion import (
    Follower,
    adopt_steps,
    copy_quantizers,
    float_parameters,
    held_schedulers,
    insert,
    named_quantizers,
    published_gradients,
    quantized_layers,
    remove,
    separate_steps,
)
from lightning_qinit.monitoring import (
    AGGREGATES,
    Monitor,
    ReportRow,
    aggregates,
    choose_quantities,
    make_row,
    tensorboard,
)
from lightning_qinit.monitoring.oscillation import Tracker, check_movable, damp
from lightning_qinit.monitoring.publish import publish_end_figures, publish_report, publish_start_figures, worst
from lightning_qinit.quantizers import Quantizer
from lightning_qinit.quantizers.fused import release_scratch
from lightning_qinit.quantizers.kernels import Kernels, check_kernels


class QuantInitCallback(Callback):
    """Quantization-aware training whose steps start where the quantization error is least.

    Inserts quantizers into the layers of any LightningModule when a stage is set up, calibrates them on a few
    training batches when ``fit`` starts, and logs each quantizer's step and error while training::

        trainer = Trainer(callbacks=[QuantInitCallback(weight_bits=4, activation_bits=4)])

    Until they are calibrated, quantizers are the identity. Calibration runs ``training_step`` (or
    ``calibration_step(batch, batch_idx)``, if the module defines it) in eval mode, without gradients unless
    ``criterion`` is ``"fisher"``, and without a trace: weights, buffers, metrics, random states, loggers and the order
    of batches are as if it had not run. A run that resumes from a checkpoint with calibrated quantizers is not
    calibrated again.

    Args:
        weight_bits: 1 to 8, or ``None`` to leave weights in float.
        activation_bits: 1 to 8, or ``None`` to leave the inputs of layers in float. Inputs that are never negative
            during calibration get unsigned levels.
        quantizer: ``"lsq"``, ``"lsq+"``, ``"apot"``, ``"pact"``, ``"codebook"``, a ``Quantizer`` subclass, its import
            path, or a mapping of one of these as ``name`` and of its options, such as
            ``{"name": "lsq", "narrow_range": True}``.
        initializer: ``"optimal"`` (least squared error, exactly), ``"minmax"``, ``"percentile"``, ``"lsq"``,
            ``"lsq+"``, ``"sawb"``, ``"aciq"``, ``"aciq_gauss"``, ``"aciq_laplace"``, ``"kl"``, ``"mse_grid"``,
            ``"constant"``, a function ``(sample, levels) -> step``, or its import path.
        weight_quantizer: instead of ``quantizer`` for weights.
        activation_quantizer: instead of ``quantizer`` for inputs.
        weight_initializer: instead of ``initializer`` for weights.
        activation_initializer: instead of ``initializer`` for inputs.
        per_channel: one step per output channel of a weight, or one per weight. Inputs have one step.
        first_last_bits: bits of the weight and the input of the first and the last layer to run; ``None`` to treat
            them as any other.
        calibration_batches: how many training batches calibration reads, over all ranks together.
        criterion: how ``"optimal"`` weighs errors: ``"mse"`` alike; ``"fisher"`` by the squared gradients of the
            training loss; ``"hessian"``, for weights, by the mean square of the inputs that they meet (layers that
            are not linear in one weight, and inputs, weigh alike); ``"output"``, for weights, by what the errors of
            all that feed an output do to it together, given the mean and the mean square of the layer's inputs (see
            :func:`~lightning_qinit.functional.optimal_output_scale`; embeddings, what meets the hidden states of
            recurrent layers, and inputs weigh alike).
        sequential: choose layer by layer in running order, each for inputs that come from layers already quantized,
            instead of all at once on the float model. Takes a pass over the batches, kept in memory, per layer.
        average_bits: choose 2 to 8 bits for each weight so that their total error is least and their average, over
            all elements, at most this. ``None`` takes ``weight_bits`` everywhere. Bits set by ``overrides`` or
            ``first_last_bits`` stay and do not count.
        recalibrate_batchnorm: re-estimate BatchNorm statistics on the calibration batches under quantization, before
            training starts.
        skip: glob patterns of layer names to leave in float, such as ``"encoder.*"``.
        overrides: glob patterns of layer names to settings that differ there: any of ``weight_bits``,
            ``activation_bits``, ``quantizer``, ``initializer``, the ``weight_`` and ``activation_`` forms of both,
            ``per_channel`` and ``first_last_bits``. Of several patterns that match, later ones win.
        step_lr_scale: learning rate of steps and offsets relative to that of the layer's weights. They never have
            weight decay: where it is set, or this is not 1, they get a parameter group of their own.
        log_quantizers: what to log of every quantizer each ``log_every_n_steps``: some of ``"step"``, ``"offset"``,
            ``"drift"`` (step relative to its start), ``"error"``, ``"sqnr_db"``, ``"clipped"``, ``"levels_used"``,
            ``"still"`` (share of weights whose integer is that of the last time), ``"to_optimal"`` (step relative to
            the one of least error now, on a few thousand values), ``"oscillation"`` (rate of integer flips back and
            forth, Nagel et al., 2022) and ``"frozen"`` (share of weights that ``freeze_oscillating`` froze). ``True``
            for all but the last two, which look at every step; ``False`` for none.
        log_costly_every: log ``"to_optimal"`` and the histograms of integers every so many-th time only.
        log_figures: of how many quantizers, those that lose most, TensorBoard gets a picture at start and end; drawing
            one takes some tenths of a second.
        damp_oscillation: strength of a term of the loss that pulls weights to the middle of their rounding cells (Nagel
            et al., ICML 2022); 0 for none.
        freeze_oscillating: freeze weights whose integer flips back and forth at more than this rate (same source), such
            as 0.01; ``None`` freezes none.
        kernels: ``"auto"`` runs quantizers as kernels (C++, on a GPU Triton), several times faster than as a chain of
            operations, where a compiler is found (the first run on a machine compiles for some seconds; a
            ``fast_dev_run`` does not); ``"compiled"`` fails where none is; ``"eager"`` never compiles.
        print_report: whether to print the table of steps and errors after calibration.
        export: where to write the best checkpoint at the end of ``fit``, or the module as it is then if the trainer
            keeps no checkpoints: ``"model.onnx"`` as an ONNX graph for the module's ``example_input_array``,
            ``"model.safetensors"`` as packed integers (see :mod:`lightning_qinit.export`). Not in a ``fast_dev_run``.

    Attributes:
        report: the rows of that table; empty before calibration and in a resumed run.

    Raises:
        ValueError: if an argument is out of range.
        MisconfigurationException: when a stage is set up, if the module has nothing to quantize or a pattern
            matches no layer. (Lightning itself refuses two of these callbacks in one Trainer.)
    """

    def __init__(
        self,
        weight_bits: int | None = 4,
        activation_bits: int | None = 4,
        quantizer: str | type[Quantizer] | dict[str, Any] = "lsq",
        initializer: str | Initializer = "optimal",
        weight_quantizer: str | type[Quantizer] | dict[str, Any] | None = None,
        activation_quantizer: str | type[Quantizer] | dict[str, Any] | None = None,
        weight_initializer: str | Initializer | None = None,
        activation_initializer: str | Initializer | None = None,
        per_channel: bool = True,
        first_last_bits: int | None = 8,
        calibration_batches: int = 16,
        criterion: Criterion = "mse",
        sequential: bool = False,
        average_bits: float | None = None,
        recalibrate_batchnorm: bool = False,
        skip: Sequence[str] = (),
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        step_lr_scale: float = 1.0,
        log_quantizers: bool | Sequence[str] = True,
        log_costly_every: int = 10,
        log_figures: int = 8,
        damp_oscillation: float = 0.0,
        freeze_oscillating: float | None = None,
        kernels: Kernels = "auto",
        print_report: bool = True,
        export: str | None = None,
    ) -> None:
        default = LayerConfig(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            quantizer=quantizer,
            initializer=initializer,
            weight_quantizer=weight_quantizer,
            activation_quantizer=activation_quantizer,
            weight_initializer=weight_initializer,
            activation_initializer=activation_initializer,
            per_channel=per_channel,
            first_last_bits=first_last_bits,
        )
        self.config = QuantConfig(default, skip=skip, overrides=overrides or {})
        self.calibration = CalibrationConfig(
            batches=calibration_batches,
            criterion=criterion,
            sequential=sequential,
            average_bits=average_bits,
            recalibrate_batchnorm=recalibrate_batchnorm,
        )
        if average_bits is not None:
            default.check_widths(WIDTHS)
        check("step_lr_scale", step_lr_scale, is_number(step_lr_scale) and step_lr_scale > 0, "a positive number")
        check_whole("log_costly_every", log_costly_every, 1)
        check_whole("log_figures", log_figures, 0)
        for argument, share in (("damp_oscillation", damp_oscillation), ("freeze_oscillating", freeze_oscillating)):
            check(argument, share, share is None or (is_number(share) and share >= 0), "a number of at least 0")
        self.step_lr_scale = float(step_lr_scale)
        self.damp_oscillation, self.freeze_oscillating = damp_oscillation or 0.0, freeze_oscillating
        self.quantities = choose_quantities(log_quantizers)
        self.log_costly_every, self.log_figures = log_costly_every, log_figures
        self.kernels = check_kernels(kernels)
        self.print_report = print_report
        self.export = check_path(export)
        self.report: list[ReportRow] = []
        self._quantizers: list[Quantizer] = []
        self._shown: list[str] = []  # the quantizers that there are pictures of
        self._monitor: Monitor | None = None
        self._tracker: Tracker | None = None
        self._tracked: dict[str, Any] | None = None  # its state in the checkpoint that is resumed, or at the end
        self._aggregates: dict[str, float] = {}  # as published last
        self._settled: list[tuple[Optimizer, int]] = []  # the optimizers, and their numbers of groups
        self._followers: list[Follower] = []  # groups of steps whose learning rate no scheduler sets
        self._calibrates = False  # has still to calibrate in this fit
        self._waits: Literal["", "stream", "step"] = ""  # has still to calibrate when training begins, and why

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Insert, in every stage: the optimizer, the strategy and checkpoints must see the quantizers."""
        check_launch(trainer, pl_module)
        check_order(self, trainer)
        if self.export is not None and stage == "fit":
            check_can_export(trainer, pl_module, self.export)
        check_before_loading(trainer, pl_module, self.config)
        self._calibrates = stage == "fit"
        if stage == "fit":  # what is known of an earlier fit, maybe of another module; a checkpoint brings it back
            self.report, self._shown, self._tracked, self._waits = [], [], None, ""
            self._aggregates = {}
        builds_late = _trainer.overrides(pl_module, "setup") or _trainer.overrides(pl_module, "configure_model")
        kernels: Kernels = "eager" if _trainer.is_dry_run(trainer) else self.kernels
        before = quantized_layers(pl_module)
        self._insert(pl_module, kernels, complete=not builds_late)
        if not builds_late:
            return
        check_copies(trainer, pl_module)
        configure_model = pl_module.configure_model

        def configure_model_then_insert() -> None:
            # once is enough, and a copy of the module must not carry a function of the original
            put_back(pl_module, "configure_model")
            configure_model()
            try:
                self._insert(pl_module, kernels)
            except MisconfigurationException:  # a pattern that matches none of the layers that there are now
                remove(pl_module, keep=before)
                raise

        # layers built in the module's own `setup` or `configure_model` do not exist yet
        vars(configure_model_then_insert)["instead_of"] = vars(pl_module).get("configure_model")
        vars(pl_module)["configure_model"] = configure_model_then_insert

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizers, and calibrate if all weights are there: the module is on its device."""
        untrained = self._settle_optimizers(trainer, pl_module)
        quantizers = list(named_quantizers(quantized_layers(pl_module)).values())
        if self.damp_oscillation or self.freeze_oscillating is not None:
            check_movable(quantized_layers(pl_module))
        _trainer.clip_within(trainer, partial(published_gradients, quantizers))
        if _trainer.restores_late(trainer):
            return
        stop_checking(trainer, pl_module)
        if untrained:
            rank_zero_warn(
                f"No optimizer trains {shorten(untrained)}, so the steps of these layers stay as calibrated."
            )
        if not _trainer.overrides(pl_module, "on_fit_start"):  # which comes after this one, and may load weights
            self._calibrate(trainer, pl_module)

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, if the strategy, or the module in its own ``on_fit_start``, has only now loaded weights."""
        self._calibrate(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, if there was no sanity check; prepare logging."""
        self._calibrate(trainer, pl_module)
        self._publish(trainer, {})  # once more: the sanity check forgets all metrics, and so does a run that resumes
        stop_checking(trainer, pl_module)
        layers = quantized_layers(pl_module)
        self._quantizers = list(named_quantizers(layers).values())
        self._tracker = self._monitor = None
        if {"oscillation", "frozen"} & set(self.quantities) or self.freeze_oscillating is not None:
            self._tracker = Tracker(layers, self.freeze_oscillating)
            if self._tracked is not None:
                self._tracker.load_state_dict(self._tracked)
        if self.quantities:
            self._monitor = Monitor(layers, self.quantities, self.log_costly_every, self._tracker)
            self._monitor.keep = frozenset(self._shown)
            tensorboard.add_layout(tensorboard.writers(trainer), self._monitor)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the batches of a logging step. Calibrate, where it could not be done before.

        On data that cannot be read ahead, and where the step needs what the module's hooks set up as training starts.
        """
        if batch_idx % trainer.accumulate_grad_batches == 0:  # the optimizer may have stepped
            accumulates = trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization
            self._keep_weights(trainer, accumulates)
        if self._settled != _groups_of(trainer):  # a layer was unfrozen
            self._settle_optimizers(trainer, pl_module)
        for follower in self._followers:
            follower.follow()
        if self._waits:
            self._start(trainer, pl_module, [batch] if self._waits == "stream" else None)
            self._waits = ""
            if self._monitor is not None:
                self._monitor.keep = frozenset(self._shown)
        if self._monitor is not None and self._measures(trainer):
            self._monitor.open()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Give steps that are not in use a gradient of zero where DDP waits for one from every parameter."""
        if _trainer.needs_every_gradient(trainer):
            idle = [p for q in self._quantizers if not q.is_calibrated for p in q.parameters() if p.requires_grad]
            reached = reached_by(loss) if idle else set()  # a module may see to it itself
            if unreached := [p.sum() for p in idle if id(p) not in reached]:
                (0 * torch.stack(unreached).sum()).backward()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Follow a learning rate that the step has set. Damp oscillations, if asked to."""
        for follower in self._followers:
            follower.follow()
        if self.damp_oscillation:
            held = (p for group in optimizer.param_groups for p in group["params"])
            damp(quantized_layers(pl_module), held, self.damp_oscillation)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was measured."""
        if self._tracker is not None and _trainer.has_stepped(trainer):
            self._tracker.update()
        monitor = self._monitor
        if monitor is None or not self._measures(trainer) or not _trainer.has_stepped(trainer):
            return
        costly = monitor.is_costly
        values = monitor.close(lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"))
        step = _trainer.logging_step(trainer)
        self._publish(trainer, values)
        for logger in trainer.loggers if _trainer.is_logging_batch(trainer) else ():
            logger.log_metrics(values, step=step)
        if costly:
            tensorboard.add_codes(tensorboard.writers(trainer), monitor, self._shown, step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the quantizers as they are now, and file the run under its settings."""
        if self._monitor is not None and self._monitor.counts:
            publish_end_figures(trainer, pl_module, self._monitor, self._shown, _trainer.logging_step(trainer))
            final = {f"final {name}": value for name, value in self._aggregates.items()}
            tensorboard.add_hparams(trainer, plain(self.config), final)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the best checkpoint, if asked to: all have been written by now."""
        self._calibrate(trainer, pl_module)  # for a training that never began
        if self._waits:  # what failed before the first step fails for good
            self._waits = ""
            self._start(trainer, pl_module)
        if self.export is not None and trainer.is_global_zero and not _trainer.is_dry_run(trainer):
            export_best(trainer, pl_module, self.export)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize every weight once. Say so if the numbers are those of the float module."""
        if trainer.state.fn != "fit":
            self._warn_if_float(pl_module)
        if self._monitor is not None:  # open between two batches of one step
            self._monitor.pause()
        self._start_evaluation(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training changes weights."""
        self._keep_weights(trainer, False)
        if self._monitor is not None:
            self._monitor.resume()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize every weight once. Say so if the numbers are those of the float module."""
        self._warn_if_float(pl_module)
        self._start_evaluation(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize every weight once. Say so if the numbers are those of the float module."""
        self._warn_if_float(pl_module)
        self._start_evaluation(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind; the quantizers stay."""
        put_back(pl_module, "configure_model")
        put_back(pl_module, "on_load_checkpoint")
        _trainer.clip_as_usual(trainer)
        if self._tracker is not None:
            self._tracked = self._tracker.state_dict()
        if self._monitor is not None:
            self._monitor.stop()
        self._monitor = self._tracker = None
        self._keep_weights(trainer, False)
        self._quantizers, self._followers, self._settled = [], [], []
        release_scratch()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at teardown, which an exception skips."""
        self.teardown(trainer, pl_module, "exception")

    @property
    @override
    def state_key(self) -> str:
        """The same for subclasses, so that what they trained can be loaded."""
        return STATE_KEY

    @override
    def state_dict(self) -> dict[str, Any]:
        """The settings, as plain types, the mean and greatest error, and what is known of oscillating weights."""
        tracked = self._tracked if self._tracker is None else self._tracker.state_dict()
        state = {**plain(self.config), "aggregates": dict(self._aggregates)}
        return state if tracked is None else {**state, "oscillation": tracked}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint whose quantizers were set up differently."""
        check_settings(state_dict, self.config)
        self._tracked = state_dict.get("oscillation")
        self._aggregates = dict(state_dict.get("aggregates", {}))

    def _start_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            stop_checking(trainer, pl_module)
        self._quantizers = list(named_quantizers(quantized_layers(pl_module)).values())
        # elsewhere a quantizer would not see averaged weights that a step puts in and out by `weight.data`
        self._keep_weights(trainer, pl_module.device.type == "cpu")

    def _keep_weights(self, trainer: Trainer, keep: bool) -> None:
        """Quantize weights once while they cannot change; not where a strategy gathers them for every use (FSDP)."""
        for quantizer in self._quantizers:
            if quantizer.batch_axis is None and (keep or quantizer.kept.on):
                quantizer.kept.switch(keep and not _trainer.restores_late(trainer))

    def _settle_optimizers(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Have every step in an optimizer, without weight decay; the layers that none trains."""
        layers = quantized_layers(pl_module)
        untrained = adopt_steps(layers, trainer.optimizers)
        schedulers = [*_trainer.schedulers(trainer), *held_schedulers(pl_module)]
        self._followers += separate_steps(layers, trainer.optimizers, schedulers, self.step_lr_scale)
        self._settled = _groups_of(trainer)
        return untrained

    def _insert(self, pl_module: LightningModule, kernels: Kernels, complete: bool = True) -> None:
        try:
            insert(pl_module, self.config, complete, kernels)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._calibrates:
            return
        self._calibrates = False
        layers = quantized_layers(pl_module)
        if any(quantizer.is_calibrated for quantizer in named_quantizers(layers).values()):
            # resumed, or fitted before; but layers that are new since then, or did not run, are calibrated now
            if trainer.ckpt_path is not None or not any(layer.awaits_calibration for layer in layers.values()):
                return
        if _trainer.is_stream(trainer):
            self._waits = "stream"
            return
        try:
            self._start(trainer, pl_module)
        except StepError:  # tried once more where no hook of the module is still to come
            self._waits = "step"

    def _start(self, trainer: Trainer, pl_module: LightningModule, given: Sequence[Any] | None = None) -> None:
        """Choose all steps, set them, and report."""
        layers = quantized_layers(pl_module)
        starts, seen, statistics = choose_in_training(trainer, pl_module, layers, self.calibration, given)
        if not seen.first_run:
            rank_zero_warn("Calibration saw no training batch that runs a quantized layer, so nothing is quantized.")
            return
        starts = [start for start in starts if not start.quantizer.is_calibrated]  # of an earlier fit
        if starts:
            settle(starts, statistics)
            for copy in _trainer.averaged_modules(trainer):
                copy_quantizers(pl_module, copy)
        unseen = warn_of(starts, layers, seen)
        if self.export is not None:
            check_calibrated(pl_module, self.export)
        if not starts:
            return
        self.report = [make_row(start) for start in starts]
        self._publish(trainer, aggregates([row.error for row in self.report]))
        self._shown = worst(self.report, self.log_figures)
        publish_report(trainer, self.report, unseen, float_parameters(pl_module), self.print_report)
        if self.quantities:
            publish_start_figures(trainer, pl_module, starts, seen, self._shown)

    def _measures(self, trainer: Trainer) -> bool:
        """On logging steps, and at once where others could not monitor the aggregates otherwise."""
        return _trainer.is_logging_batch(trainer) or not self._aggregates

    def _publish(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Let other callbacks monitor the aggregates."""
        self._aggregates.update({name: value for name, value in values.items() if name in AGGREGATES})
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._aggregates.items()})

    def _warn_if_float(self, pl_module: LightningModule) -> None:
        quantizers = named_quantizers(quantized_layers(pl_module))
        if not any(quantizer.is_calibrated for quantizer in quantizers.values()):
            rank_zero_warn(
                "No quantizer is calibrated, so these are the numbers of the float module: run `fit` first, or load a "
                "checkpoint of a quantized one."
            )


def _groups_of(trainer: Trainer) -> list[tuple[Optimizer, int]]:
    return [(optimizer, len(optimizer.param_groups)) for optimizer in trainer.optimizers]
