"""From what calibration saw to the steps: plan everything first, change the module only when all of it is known."""

from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_qinit.calibration.observe import Observation
from lightning_qinit.config import shorten
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers import usable
from lightning_qinit.insertion import QuantizedLayer
from lightning_qinit.quantizers import Quantizer


@dataclass(frozen=True)
class Start:
    """Where one quantizer starts.

    Attributes:
        layer: name of the layer.
        what: ``"weight"`` or ``"input"``.
        quantizer: the quantizer to start.
        bits: 1 to 8.
        signed: whether its levels reach below zero.
        step: float64, ``(channels,)``.
        sample: the data that the step was chosen for.
        note: what the report says about it.
    """

    layer: str
    what: str
    quantizer: Quantizer
    bits: int
    signed: bool
    step: Tensor
    sample: Sample
    note: str = ""

    @property
    def levels(self) -> Tensor:
        """The level set that the step belongs to."""
        return self.quantizer.level_set(self.bits, self.signed)

    @property
    def blind(self) -> bool:
        """Whether the data say nothing of a step: they are all zero."""
        return not bool((self.sample.energy > 0).any())

    def apply(self) -> None:
        """Start the quantizer."""
        self.quantizer.start(self.step, self.bits, self.signed)


def check_weights(layers: dict[str, QuantizedLayer]) -> None:
    """Raise ``ValueError`` naming the first layer whose weight holds NaN or infinite values."""
    for name, layer in layers.items():
        bad = int((~layer.weight.detach().isfinite()).sum())
        if bad:
            raise ValueError(
                f"The weight of layer {name!r} holds {bad} NaN or infinite values; a step needs finite weights."
            )


@torch.no_grad()
def plan(layers: dict[str, QuantizedLayer], observation: Observation) -> list[Start]:
    """Choose the step of every quantizer by its layer's initializer; changes nothing.

    A layer that never ran gets no steps and stays in float: neither its input nor the use of its weight was seen.
    """
    check_weights(layers)
    ends = {*observation.first_run[:1], *filter(None, [observation.last_run])}
    starts = []
    for name, layer in layers.items():
        if name not in observation.first_run:
            continue
        bits_at_ends = layer.quant_config.first_last_bits if name in ends else None
        for what, quantizer in layer.quantizers().items():
            if what == "weight":
                sample, signed = Sample.of_tensor(layer.weight, quantizer.channel_axis), True
                # weights that start at zero (a new head, LoRA's second matrix) grow to about the size that torch's
                # layers start with, 1 / sqrt(inputs per output)
                reach = (layer.weight.numel() / layer.weight.shape[layer.output_axis]) ** -0.5
            else:
                sketch = observation.inputs.get(name)
                if sketch is None or not sketch.count:
                    continue
                sample, signed, reach = sketch.sample(), sketch.signed, 1.0
            bits = bits_at_ends or quantizer.n_bits
            levels = quantizer.level_set(bits, signed)
            chosen = layer.quant_config.initializer_function(sample, levels)
            step, note = usable(chosen, sample, fallback=reach / float(levels.abs().max()))
            starts.append(Start(name, what, quantizer, bits, signed, step, sample, note))
    return starts


def warn_blind(starts: list[Start]) -> None:
    """Say once which quantizers start without any nonzero value to go by."""
    blind = [f"{start.layer}.{start.what}" for start in starts if start.blind]
    if blind:
        rank_zero_warn(
            f"Calibration saw only zeros in {shorten(blind)}: their steps start from the size that trained weights "
            "(1 / sqrt(inputs per output)) or inputs (1) usually have."
        )
