"""Weights that flip between two integers, and two remedies (Nagel et al., ICML 2022, arXiv 2203.11086)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_qinit.functional.fake_quantize import broadcast_channels
from lightning_qinit.functional.sharded import is_sharded
from lightning_qinit.insertion import QuantizedLayer, named_quantizers
from lightning_qinit.monitoring.codes import codes_of
from lightning_qinit.quantizers import Quantizer

MOMENTUM = 0.01


class Oscillation:
    """The rate at which each weight's integer flips back and forth, as an exponential average.

    An integer oscillates at a step if it changed, and changed in the other direction than at its last change
    (section 3); ``rate`` is the exponential average of that.

    Args:
        codes: the integers at the start.
        momentum: weight of the newest step.

    Attributes:
        rate: per weight, 0 to 1.
        mean: exponential average of the integers, which says where a weight that is frozen should stay.
    """

    def __init__(self, codes: Tensor, momentum: float = MOMENTUM) -> None:
        self.momentum = momentum
        self.codes = codes.to(torch.int16)
        self.direction = torch.zeros_like(codes, dtype=torch.int8)
        self.rate = torch.zeros_like(codes, dtype=torch.float32)
        self.mean = codes.to(torch.float32)

    @torch.no_grad()
    def update(self, codes: Tensor) -> Tensor:
        """Take the integers of a step; returns which weights oscillated at it."""
        codes = codes.to(torch.int16)
        direction = (codes - self.codes).sign().to(torch.int8)
        oscillates = direction * self.direction < 0
        self.codes = codes
        self.direction = torch.where(direction != 0, direction, self.direction)
        self.rate.lerp_(oscillates.to(self.rate), self.momentum)
        self.mean.lerp_(codes.to(self.mean), self.momentum)
        return oscillates


class Tracker:
    """Follows the oscillation of all quantized weights from step to step, and freezes those that oscillate too often.

    A weight whose rate exceeds ``freeze_above`` is put on the integer nearest to the average of its integers and stays
    there. Memory: 11 bytes per weight.

    Args:
        layers: the layers to watch.
        freeze_above: the rate; ``None`` to freeze nothing.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer], freeze_above: float | None = None) -> None:
        names = named_quantizers(layers)
        self.weights = {
            f"{name}.{what}": (layer, what)
            for name, layer in layers.items()
            for what in layer.weight_quantizers()
            if f"{name}.{what}" in names
        }
        self.freeze_above = freeze_above
        self.oscillation: dict[str, Oscillation] = {}
        self.frozen: dict[str, Tensor] = {}  # the level that a weight stays on; -1: it is free

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after an optimizer step."""
        for name, quantizer, weight, parameter in self._active():
            codes = codes_of(quantizer, quantizer.transform(weight.detach().float()))
            if name not in self.oscillation:
                self.oscillation[name] = Oscillation(codes)
                continue
            tracked = self.oscillation[name]
            tracked.update(codes)
            if self.freeze_above is not None:
                self._freeze(name, quantizer, parameter, tracked.rate > self.freeze_above)

    def _freeze(self, name: str, quantizer: Quantizer, weight: Tensor, oscillates: Tensor) -> None:
        tracked = self.oscillation[name]
        frozen = self.frozen.setdefault(name, torch.full_like(tracked.codes, -1))
        frozen = torch.where(oscillates & (frozen < 0), tracked.mean.round().to(frozen), frozen)
        self.frozen[name] = frozen
        level = quantizer.levels.to(tracked.mean)[frozen.clamp(min=0).long()]
        step = broadcast_channels(quantizer.step.detach(), weight, quantizer.channel_axis)
        weight.copy_(torch.where(frozen >= 0, (level * step).to(weight), weight))

    def _active(self) -> Iterable[tuple[str, Quantizer, Tensor, Tensor]]:
        """Name, quantizer, weight, and the parameter that its values lie in."""
        for name, (layer, what) in self.weights.items():
            quantizer = layer.weight_quantizers()[what]
            if quantizer.active:
                yield name, quantizer, layer.weights()[what], _parameters(layer)[what]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, so that a resumed run goes on as it would have."""
        tracked = {name: {**vars(oscillation)} for name, oscillation in self.oscillation.items()}
        return {"oscillation": tracked, "frozen": dict(self.frozen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        for name, values in state["oscillation"].items():
            device = self.weights[name][0].weights()[self.weights[name][1]].device
            self.oscillation[name] = Oscillation(values["codes"].to(device), values["momentum"])
            for key, value in values.items():
                setattr(self.oscillation[name], key, value.to(device) if isinstance(value, Tensor) else value)
        self.frozen = {name: frozen.to(self.oscillation[name].rate.device) for name, frozen in state["frozen"].items()}


def _parameters(layer: QuantizedLayer) -> dict[str, Tensor]:
    """What the values of a layer's weights lie in, by the names of their quantizers: pruning puts a mask before it."""
    weights, names = layer.weights(), layer.parameter_quantizers()
    return {
        what: getattr(layer, f"{name}_orig") if hasattr(layer, f"{name}_mask") else weights[what]
        for what, name in zip(layer.weight_quantizers(), names, strict=True)
    }


def check_movable(layers: Mapping[str, QuantizedLayer]) -> None:
    """Raise ``MisconfigurationException`` for weights that cannot be moved to a multiple of a step: they are normalized
    by their quantizer, or computed by a hook.
    """
    values = torch.tensor([1.0, 2.0, 4.0])
    for name, layer in layers.items():
        if any(map(is_sharded, _parameters(layer).values())):
            raise MisconfigurationException(
                "`damp_oscillation` and `freeze_oscillating` compare a weight with its steps value by value, but the "
                f"strategy shards the weight of layer {name!r}: use one that does not."
            )
        if not all(isinstance(p, nn.Parameter) for p in _parameters(layer).values()):
            raise MisconfigurationException(
                "`damp_oscillation` and `freeze_oscillating` move weights to levels of their quantizer, but a hook "
                f"(spectral or weight norm) computes the weight of layer {name!r}: remove it, or `skip` the layer."
            )
        for quantizer in layer.weight_quantizers().values():
            if not torch.equal(quantizer.transform(values), values):
                raise MisconfigurationException(
                    f"`damp_oscillation` and `freeze_oscillating` move weights to levels of their quantizer, but it "
                    f"normalizes the weight of layer {name!r} before: use a quantizer that does not."
                )


@torch.no_grad()
def damp(layers: Mapping[str, QuantizedLayer], learned: Iterable[Tensor], strength: float) -> None:
    """Add the gradient of ``strength * |q(w) - clip(w)|^2`` to that of every weight that is learned.

    It pulls weights to the middle of their rounding cells. Called between the backward pass and the optimizer step,
    it is the same as a term of the loss.
    """
    waiting = {id(parameter) for parameter in learned}
    for layer in layers.values():
        weights, parameters = layer.weights(), _parameters(layer)
        for what, quantizer in layer.weight_quantizers().items():
            weight, parameter = weights[what], parameters[what]
            if not quantizer.active or parameter.grad is None or id(parameter) not in waiting:
                continue
            waiting.remove(id(parameter))  # tied weights are damped once
            step = broadcast_channels(quantizer.step.detach(), weight, quantizer.channel_axis)
            v = weight.detach() / step
            inside = (v > quantizer.low) & (v < quantizer.high)
            pull = 2 * strength * inside * (weight.detach() - quantizer(weight.detach()))
            parameter.grad += pull.to(parameter.grad)
