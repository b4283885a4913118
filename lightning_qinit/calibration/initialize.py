"""From what calibration saw to the steps: plan everything first, change the module only when all of it is known."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qinit.calibration.observe import Observation
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
    """

    layer: str
    what: str
    quantizer: Quantizer
    bits: int
    signed: bool
    step: Tensor
    sample: Sample

    @property
    def levels(self) -> Tensor:
        """The level set that the step belongs to."""
        return self.quantizer.level_set(self.bits, self.signed)

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
            else:
                sketch = observation.inputs.get(name)
                if sketch is None or not sketch.count:
                    continue
                sample, signed = sketch.sample(), sketch.signed
            bits = bits_at_ends or quantizer.n_bits
            levels = quantizer.level_set(bits, signed)
            step = usable(layer.quant_config.initializer_function(sample, levels), sample)
            starts.append(Start(name, what, quantizer, bits, signed, step, sample))
    return starts
