"""Where a quantizer starts, chosen by its layer's initializer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_qinit.calibration.data import CalibrationData
from lightning_qinit.calibration.measure import Measures, measure
from lightning_qinit.calibration.observe import Observation
from lightning_qinit.checks import shorten
from lightning_qinit.initializers import initialize
from lightning_qinit.initializers.optimal import optimal
from lightning_qinit.insertion import QuantizedLayer, named_quantizers
from lightning_qinit.quantizers import Quantizer


@dataclass(frozen=True)
class Start:
    """Where one quantizer starts.

    Attributes:
        layer: name of the layer.
        what: ``"weight"`` or ``"input"``, or the name of the parameter or input in layers with several.
        quantizer: the quantizer to start.
        bits: 1 to 8.
        signed: whether its levels reach below zero.
        step: float64, ``(channels,)``.
        measures: what it costs on its data.
        offset: as ``step``, for quantizers that have one.
        note: what the report says about it.
    """

    layer: str
    what: str
    quantizer: Quantizer
    bits: int
    signed: bool
    step: Tensor
    measures: Measures
    offset: Tensor | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """``layer.what``, as in the logged names."""
        return f"{self.layer}.{self.what}"

    def chosen(self) -> tuple[int, Tensor, Tensor | None]:
        """Bits, step and offset, on the CPU."""
        return self.bits, self.step.cpu(), None if self.offset is None else self.offset.cpu()

    def at(self, bits: int, step: Tensor, offset: Tensor | None) -> "Start":
        """The same with what another rank chose."""
        return replace(self, bits=bits, step=step, offset=offset)

    def apply(self) -> None:
        """Start the quantizer."""
        self.quantizer.start(self.step, self.bits, self.signed, self.offset)


@torch.no_grad()
def plan(data: CalibrationData, bits: Mapping[str, int], names: Iterable[str] | None = None) -> list[Start]:
    """Choose the step of every quantizer by its layer's initializer; changes nothing.

    A layer that never ran gets no steps and stays in float: neither its input nor the use of its weight was seen.

    Args:
        data: of the quantizers.
        bits: of quantizers by name, where they are not those of the layer's settings.
        names: of the quantizers to start; ``None`` for all.
    """
    quantizers = named_quantizers(data.layers)
    names = quantizers if names is None else names
    planned = (_start(name, quantizers[name], data, bits.get(name, quantizers[name].n_bits)) for name in names)
    return [start for start in planned if start is not None]


def _start(full_name: str, quantizer: Quantizer, calibration: CalibrationData, bits: int) -> Start | None:
    data = calibration.of(full_name)
    if data is None:
        return None
    name, _, what = full_name.rpartition(".")
    layer = calibration.layers[name]
    rule = layer.quant_config.initializer_of("weight" if what in layer.weights() else "activation")
    levels = quantizer.level_set(bits, data.signed)
    sample, note = (data.weighted, data.note) if rule is optimal else (data.sample, "")
    try:
        chosen = initialize(rule, sample, levels, quantizer.has_offset, data.reach / float(levels.abs().max()))
    except TypeError as error:
        raise TypeError(f"{full_name}: {error}") from error
    measures = measure(data.sample, levels, chosen)
    note = "; ".join(filter(None, (note, chosen.note)))
    return Start(name, what, quantizer, bits, data.signed, chosen.step, measures, chosen.offset, note)


def warn_of(starts: list[Start], layers: Mapping[str, QuantizedLayer], seen: Observation) -> list[str]:
    """Say once what calibration had nothing to go by for; returns the quantizers that stay in float."""
    blind = [start.name for start in starts if start.measures.blind]
    if blind:
        rank_zero_warn(
            f"Calibration saw only zeros in {shorten(blind)}: their steps start from the size that trained weights "
            "(1 / sqrt(inputs per output)) or inputs (1) usually have."
        )
    nonfinite = [name for name, sketch in seen.inputs.items() if sketch.nonfinite]
    if nonfinite:
        rank_zero_warn(f"Calibration met NaN or infinite values in {shorten(nonfinite)}; they were left out.")
    served = {f"{name}.{what}" for name in seen.first_run for what in layers[name].optional_inputs}
    unseen = [name for name, q in named_quantizers(layers).items() if not q.is_calibrated and name not in served]
    if unseen:
        rank_zero_warn(
            f"Calibration saw no data for {shorten(unseen)}, which stay in float: their layers did not run, or "
            "their weights are used without calling them. `skip` leaves such layers alone."
        )
    return unseen
