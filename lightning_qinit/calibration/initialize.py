"""From what calibration saw to the steps: plan everything first, change the module only when all of it is known."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_qinit.calibration.allocate import allocate_bits
from lightning_qinit.calibration.observe import Criterion, Observation
from lightning_qinit.config import shorten
from lightning_qinit.functional.affine import affine_error
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers import initialize
from lightning_qinit.initializers.optimal import optimal
from lightning_qinit.insertion import QuantizedLayer, named_quantizers
from lightning_qinit.quantizers import Quantizer

WIDTHS = range(2, 9)  # what `average_bits` chooses from


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
        sample: the data that the step was chosen for.
        offset: as ``step``, for quantizers that have one.
        note: what the report says about it.
    """

    layer: str
    what: str
    quantizer: Quantizer
    bits: int
    signed: bool
    step: Tensor
    sample: Sample
    offset: Tensor | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """``layer.what``, as in the logged names."""
        return f"{self.layer}.{self.what}"

    @property
    def levels(self) -> Tensor:
        """The level set that the step belongs to."""
        return self.quantizer.level_set(self.bits, self.signed)

    @property
    def blind(self) -> bool:
        """Whether the data say nothing of a step: they are all zero."""
        return not bool((self.sample.energy > 0).any())

    @property
    def error(self) -> Tensor:
        """Sum of squared errors of each group on the data, ``(channels,)``."""
        return affine_error(self.sample, self.levels, self.step, self.offset)

    @property
    def share_clipped(self) -> float:
        """The share of the data more than half a step beyond the outermost points."""
        data = self.sample if self.offset is None else self.sample.shifted(self.offset)
        return data.share_clipped(self.levels, self.step)

    def chosen(self) -> tuple[int, Tensor, Tensor | None]:
        """Bits, step and offset, on the CPU."""
        return self.bits, self.step.cpu(), None if self.offset is None else self.offset.cpu()

    def at(self, bits: int, step: Tensor, offset: Tensor | None) -> "Start":
        """The same with what another rank chose."""
        return replace(self, bits=bits, step=step, offset=offset)

    def apply(self) -> None:
        """Start the quantizer."""
        self.quantizer.start(self.step, self.bits, self.signed, self.offset)


def check_weights(layers: Mapping[str, QuantizedLayer]) -> None:
    """Raise ``ValueError`` naming the first layer whose weight holds NaN or infinite values."""
    for name, layer in layers.items():
        for weight in layer.weights().values():
            bad = int((~weight.detach().isfinite()).sum())
            if bad:
                raise ValueError(
                    f"The weight of layer {name!r} holds {bad} NaN or infinite values; a step needs finite weights."
                )


@torch.no_grad()
def plan(
    layers: Mapping[str, QuantizedLayer],
    observation: Observation,
    bits: Mapping[str, int],
    names: Iterable[str] | None = None,
) -> list[Start]:
    """Choose the step of every quantizer by its layer's initializer; changes nothing.

    A layer that never ran gets no steps and stays in float: neither its input nor the use of its weight was seen.

    Args:
        layers: the layers to start.
        observation: what was seen of them.
        bits: of quantizers by name, where they are not those of the layer's settings.
        names: of the quantizers to start; ``None`` for all.
    """
    quantizers = named_quantizers(layers)
    planned = (
        _start(name, layers, observation, bits.get(name, quantizers[name].n_bits))
        for name in (quantizers if names is None else names)
    )
    return [start for start in planned if start is not None]


def _start(full_name: str, layers: Mapping[str, QuantizedLayer], observation: Observation, bits: int) -> Start | None:
    name, _, what = full_name.rpartition(".")
    layer, weights = layers[name], layers[name].weights()
    quantizer = layer.quantizers()[what]
    if not any(user in observation.first_run for user in _users(quantizer, layers)):
        return None
    if what in weights:
        weight = weights[what].detach()
        sample, signed = Sample.of_tensor(quantizer.transform(weight), quantizer.channel_axis), True
        # weights that start at zero (a new head, LoRA's second matrix) grow to about the size that torch's
        # layers start with, 1 / sqrt(inputs per output)
        reach = (weight.numel() / weight.shape[layer.output_axis]) ** -0.5
        rule = layer.quant_config.initializer_of("weight")
    else:
        sketch = observation.inputs.get(full_name)
        if sketch is None or not sketch.count:
            return None
        sample, signed, reach = sketch.sample(), sketch.signed, 1.0
        rule = layer.quant_config.initializer_of("activation")
    levels = quantizer.level_set(bits, signed)
    data, note = sample, ""
    if rule is optimal and observation.criterion != "mse":
        data, note = _weighted(full_name, quantizer, sample, observation)
    step, offset, remark = initialize(rule, data, levels, quantizer.has_offset, reach / float(levels.abs().max()))
    note = "; ".join(filter(None, (note, remark)))
    return Start(name, what, quantizer, bits, signed, step, sample, offset, note)


def _users(quantizer: Quantizer, layers: Mapping[str, QuantizedLayer]) -> list[str]:
    """The layers that use a quantizer: several, if their weights are tied."""
    return [name for name, layer in layers.items() if any(q is quantizer for q in layer.quantizers().values())]


def _weighted(name: str, quantizer: Quantizer, sample: Sample, observation: Observation) -> tuple[Sample, str]:
    """The data weighted by importance; as they are, and a note, where none was seen."""
    importance = observation.weight_importance.get(name)
    if importance is not None and float(importance.sum()) > 0:
        weights = Sample.of_tensor(importance, quantizer.channel_axis).values
        # a channel that nothing depends on keeps the plain optimum
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
        return Sample(sample.values, weights, sample.minimum, sample.maximum), ""
    sketch = observation.input_importance.get(name)
    if sketch is not None:
        weighted = sketch.sample()
        if float(weighted.energy) > 0:
            return weighted, ""
    return sample, f"no {observation.criterion} importance, so all values count alike"


def bits_at_ends(layers: Mapping[str, QuantizedLayer], observation: Observation) -> dict[str, int]:
    """Bits of the quantizers of the first and the last layer to run, where the settings make an exception of them."""
    ends = {*observation.first_run[:1], *filter(None, [observation.last_run])}
    bits = {}
    for name, quantizer in named_quantizers(layers).items():
        asked = [layers[user].quant_config.first_last_bits for user in _users(quantizer, layers) if user in ends]
        if asked and asked[0] is not None:
            bits[name] = asked[0]
    return bits


def average_bits(
    layers: Mapping[str, QuantizedLayer], observation: Observation, average: float, fixed: Mapping[str, int]
) -> dict[str, int]:
    """Bits of weights, 2 to 8, of least total error under an average over all of their elements.

    The error of a weight at each width is that of its own step there: relative to the weight's energy, or, with a
    criterion, weighted by importance. Weights whose bits are set by ``overrides`` or by ``first_last_bits`` keep
    them and do not count.
    """
    sizes, errors = {}, {}
    for name, quantizer in named_quantizers(layers).items():
        layer_name, _, what = name.rpartition(".")
        users = _users(quantizer, layers)
        if (
            what not in layers[layer_name].weights()
            or name in fixed
            or any(layers[user].quant_config.bits_are_set for user in users)
            or not any(user in observation.first_run for user in users)
        ):
            continue
        sizes[name] = layers[layer_name].weights()[what].numel()
        errors[name] = [_cost(name, layers, observation, width) for width in WIDTHS]
    if not sizes:
        return {}
    chosen = allocate_bits(list(errors.values()), list(sizes.values()), WIDTHS, average)
    return dict(zip(errors, chosen, strict=True))


def _cost(name: str, layers: Mapping[str, QuantizedLayer], observation: Observation, width: int) -> float:
    start = _start(name, layers, observation, width)
    assert start is not None
    if observation.criterion == "mse":
        energy = float(start.sample.energy.sum())
        return float(start.error.sum()) / energy if energy > 0 else 0.0
    data, _ = _weighted(name, start.quantizer, start.sample, observation)
    return float(data.error(start.levels, start.step).sum())


Watch = Callable[[Mapping[str, QuantizedLayer], Criterion], Observation]


def choose(
    layers: Mapping[str, QuantizedLayer],
    watch: Watch,
    criterion: Criterion = "mse",
    sequential: bool = False,
    average: float | None = None,
) -> tuple[list[Start], Observation]:
    """Watch the layers and choose all starts.

    Args:
        layers: all quantized layers of a module.
        watch: runs the calibration batches and tells what the layers given to it saw.
        criterion: how :func:`~lightning_qinit.initializers.optimal.optimal` weighs errors.
        sequential: choose layer by layer in running order, each for inputs that come from layers already quantized.
            Starts quantizers on the way, so the caller must put the module back.
        average: average bits of weights to allocate, or ``None``.
    """
    check_weights(layers)
    observation = watch(layers, criterion)
    bits = bits_at_ends(layers, observation)
    if average is not None:
        bits |= average_bits(layers, observation, average, bits)
    if not sequential:
        return plan(layers, observation, bits), observation
    starts: list[Start] = []
    waiting = named_quantizers(layers)
    for name in list(observation.first_run):
        if layers[name].input_quantizers():  # the importance of weights was seen on the float model
            seen = watch({name: layers[name]}, "fisher" if criterion == "fisher" else "mse")
            observation.inputs.update(seen.inputs)
            observation.input_importance.update(seen.input_importance)
        # a tied weight is started with the first of its layers, whatever its name
        mine = {id(quantizer) for quantizer in layers[name].quantizers().values()}
        now = [full_name for full_name, quantizer in waiting.items() if id(quantizer) in mine]
        for start in plan(layers, observation, bits, now):
            start.apply()
            starts.append(start)
        waiting = {full_name: quantizer for full_name, quantizer in waiting.items() if full_name not in now}
    return starts, observation


def warn_blind(starts: list[Start]) -> None:
    """Say once which quantizers start without any nonzero value to go by."""
    blind = [start.name for start in starts if start.blind]
    if blind:
        rank_zero_warn(
            f"Calibration saw only zeros in {shorten(blind)}: their steps start from the size that trained weights "
            "(1 / sqrt(inputs per output)) or inputs (1) usually have."
        )
