"""From what calibration saw to the steps: plan everything first, change the module only when all of it is known."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_qinit.calibration.allocate import allocate_bits
from lightning_qinit.calibration.measure import Measures, measure
from lightning_qinit.calibration.observe import Criterion, Observation
from lightning_qinit.config import Role, shorten
from lightning_qinit.functional.output import output_rows
from lightning_qinit.functional.sample import Sample
from lightning_qinit.functional.sharded import whole
from lightning_qinit.initializers import initialize
from lightning_qinit.initializers.optimal import optimal
from lightning_qinit.insertion import QuantizedLayer, named_quantizers
from lightning_qinit.quantizers import Quantizer

WIDTHS = range(2, 9)  # what `average_bits` chooses from
MOST_ALIKE = 0.99  # inputs that are one constant would leave the errors of single weights without a cost


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


def check_weights(layers: Mapping[str, QuantizedLayer]) -> None:
    """Raise ``ValueError`` naming the first layer whose weight holds NaN or infinite values."""
    for name, layer in layers.items():
        for weight in layer.weights().values():
            bad = int((~whole(weight.detach()).isfinite()).sum())
            if bad:
                raise ValueError(
                    f"The weight of layer {name!r} holds {bad} NaN or infinite values; a step needs finite weights."
                )


def data_of(name: str, layers: Mapping[str, QuantizedLayer], observation: Observation) -> Sample | None:
    """The data that the step of a quantizer is chosen for."""
    data = _data(name, layers, observation)
    return None if data is None else data.sample


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


@dataclass(frozen=True)
class _Data:
    """What the step of a quantizer is chosen for: its data, as the criterion weighs them too, and a size at hand."""

    sample: Sample
    weighted: Sample
    signed: bool
    reach: float
    note: str


def _data(full_name: str, layers: Mapping[str, QuantizedLayer], observation: Observation) -> _Data | None:
    """The data of a quantizer; ``None`` if its layer never ran or it saw nothing."""
    name, _, what = full_name.rpartition(".")
    layer, weights = layers[name], layers[name].weights()
    quantizer = layer.quantizers()[what]
    if not any(user in observation.first_run for user in _users(quantizer, layers)):
        return None
    if what in weights:
        weight = whole(weights[what].detach())
        sample, signed = Sample.of_tensor(quantizer.transform(weight), quantizer.channel_axis), True
        # weights that start at zero (a new head, LoRA's second matrix) grow to about the size that torch's
        # layers start with, 1 / sqrt(inputs per output)
        reach = (weight.numel() / weight.shape[layer.output_axis]) ** -0.5
    else:
        sketch = observation.inputs.get(full_name)
        if sketch is None or not sketch.count:
            return None
        sample, signed, reach = sketch.sample(), sketch.signed, 1.0
    weighted, note = sample, ""
    if observation.criterion in ("fisher", "hessian"):
        weighted, note = _weighted(full_name, layers, sample, observation)
    elif observation.criterion == "output" and what in weights:
        weighted, note = _of_outputs(full_name, layers, sample, quantizer.transform(weight), observation)
    return _Data(sample, weighted, signed, reach, note)


def _start(full_name: str, layers: Mapping[str, QuantizedLayer], observation: Observation, bits: int) -> Start | None:
    data = _data(full_name, layers, observation)
    if data is None:
        return None
    name, _, what = full_name.rpartition(".")
    layer = layers[name]
    quantizer = layer.quantizers()[what]
    rule = layer.quant_config.initializer_of("weight" if what in layer.weights() else "activation")
    levels = quantizer.level_set(bits, data.signed)
    sample, note = (data.weighted, data.note) if rule is optimal else (data.sample, "")
    chosen = initialize(rule, sample, levels, quantizer.has_offset, data.reach / float(levels.abs().max()))
    measures = measure(data.sample, levels, chosen)
    note = "; ".join(filter(None, (note, chosen.note)))
    return Start(name, what, quantizer, bits, data.signed, chosen.step, measures, chosen.offset, note)


def _users(quantizer: Quantizer, layers: Mapping[str, QuantizedLayer]) -> list[str]:
    """The layers that use a quantizer: several, if their weights are tied."""
    return [name for name, layer in layers.items() if any(q is quantizer for q in layer.quantizers().values())]


def _importance(name: str, layers: Mapping[str, QuantizedLayer], observation: Observation) -> Tensor | None:
    """The importance of a weight; with tied weights, over all layers that use it."""
    seen = observation.weight_importance
    if observation.criterion == "fisher":  # the gradient of a tied weight is that of all its uses
        return seen.get(name)
    layer, _, what = name.rpartition(".")
    users = _users(layers[layer].quantizers()[what], layers)
    found = [seen[f"{user}.{what}"] for user in users if f"{user}.{what}" in seen]
    return torch.stack(found).sum(0) if found else None


def _weighted(
    name: str, layers: Mapping[str, QuantizedLayer], sample: Sample, observation: Observation
) -> tuple[Sample, str]:
    """The data weighted by importance; as they are, and a note, where none was seen."""
    importance = _importance(name, layers, observation)
    if importance is not None and float(importance.sum()) > 0:
        layer, _, what = name.rpartition(".")
        weights = Sample.of_tensor(importance, layers[layer].quantizers()[what].channel_axis).values
        # a channel that nothing depends on keeps the plain optimum
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
        return Sample(sample.values, weights, sample.minimum, sample.maximum), ""
    sketch = observation.input_importance.get(name)
    if sketch is not None:
        weighted = sketch.sample()
        if float(weighted.energy) > 0:
            return weighted, ""
    return sample, f"no {observation.criterion} importance, so all values count alike"


def _of_outputs(
    name: str, layers: Mapping[str, QuantizedLayer], sample: Sample, weight: Tensor, observation: Observation
) -> tuple[Sample, str]:
    """The data of a weight, to be judged by the outputs that it feeds; as they are, and a note, where none are known.

    Of tied weights the uses that are a product with an input count, together.
    """
    layer, _, what = name.rpartition(".")
    quantizer = layers[layer].quantizers()[what]
    users = [user for user in _users(quantizer, layers) if layers[user].inputs_met(what)]
    if not users:
        return sample, "no sum over inputs known, so all values count alike"
    user = layers[users[0]]
    weight = weight.to(sample.values)
    moments = weight.new_zeros(len(user.inputs_met(what)), 3)
    for name in users:
        for part, met in enumerate(layers[name].inputs_met(what)):
            seen = observation.moments_of(f"{name}.{met}")
            moments[part] += 0 if seen is None else seen.to(moments)
    shape = [1] * weight.dim()
    shape[user.output_axis] = -1
    correlation = _correlation(moments).repeat_interleave(weight.shape[user.output_axis] // len(moments)).view(shape)
    rows = output_rows(weight, correlation, quantizer.channel_axis, user.outputs_fed(weight))
    return Sample(rows.x, rows.w, sample.minimum, sample.maximum, rows.mean, rows.output), ""


def _correlation(moments: Tensor) -> Tensor:
    """``E[a]^2 / E[a^2]`` of counts, sums and sums of squares, ``(..., 3)``."""
    count, total, squares = moments.unbind(-1)
    product = count * squares
    return torch.where(product > 0, total.square() / product, 0.0).clamp(max=MOST_ALIKE)


def bits_at_ends(layers: Mapping[str, QuantizedLayer], observation: Observation) -> dict[str, int]:
    """Bits of the quantizers of the first and the last layer to run, where the settings make an exception of them."""
    ends = {*observation.first_run[:1], *filter(None, [observation.last_run])}
    bits = {}
    for name, quantizer in named_quantizers(layers).items():
        role: Role = "weight" if quantizer.batch_axis is None else "activation"
        configs = [layers[user].quant_config for user in _users(quantizer, layers) if user in ends]
        if configs and role not in configs[0].own_bits and configs[0].first_last_bits is not None:
            bits[name] = configs[0].first_last_bits
    return bits


def average_bits(
    layers: Mapping[str, QuantizedLayer], observation: Observation, average: float, fixed: Mapping[str, int]
) -> dict[str, int]:
    """Bits of weights, 2 to 8, of least total error under an average over all of their elements.

    The error of a weight at each width is that of its own step there: relative to the weight's energy, or, with a
    criterion, weighted by importance; a weight without importance counts with the mean importance of the others.
    Weights whose bits are set by ``overrides`` or by ``first_last_bits`` keep them and do not count.
    """
    free = _free_weights(layers, fixed)
    costs = {name: cost for name in free if (cost := _costs(name, layers, observation)) is not None}
    if not costs:
        return {}
    known = [(cost.importance, cost.size) for cost in costs.values() if cost.importance is not None]
    mean = sum(i * size for i, size in known) / sum(size for _, size in known) if known else None
    errors = [
        cost.plain if cost.importance is not None or mean is None else [error * mean for error in cost.plain]
        for cost in costs.values()
    ]
    if mean is None:
        errors = [cost.relative for cost in costs.values()]
    chosen = allocate_bits(errors, [cost.size for cost in costs.values()], WIDTHS, average)
    return dict(zip(costs, chosen, strict=True))


def _free_weights(layers: Mapping[str, QuantizedLayer], fixed: Mapping[str, int]) -> list[str]:
    """Quantizers of weights whose bits nothing sets."""
    return [
        name
        for name, quantizer in named_quantizers(layers).items()
        if quantizer.batch_axis is None
        and name not in fixed
        and not any("weight" in layers[user].quant_config.own_bits for user in _users(quantizer, layers))
    ]


@dataclass(frozen=True)
class _Costs:
    """The error of a weight at every width: weighted by importance if there is any, and relative to its energy."""

    size: int
    plain: list[float]
    relative: list[float]
    importance: float | None  # the mean over its elements


def _costs(name: str, layers: Mapping[str, QuantizedLayer], observation: Observation) -> _Costs | None:
    data = _data(name, layers, observation)
    if data is None:
        return None
    layer, _, what = name.rpartition(".")
    quantizer, config = layers[layer].quantizers()[what], layers[layer].quant_config
    rule = config.initializer_of("weight")
    energy = float(data.sample.energy.sum())
    has_importance = data.weighted is not data.sample and observation.criterion != "output"
    plain = []
    for width in WIDTHS:
        levels = quantizer.level_set(width, signed=True)
        chosen = initialize(rule, data.weighted if rule is optimal else data.sample, levels)
        plain.append(float(data.weighted.error(levels, chosen.step).sum()))
    importance = float(data.weighted.count.sum()) / data.sample.values.numel() if has_importance else None
    relative = [error / energy if energy > 0 else 0.0 for error in plain]
    return _Costs(data.sample.values.numel(), plain, relative, importance)


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
    if average is not None:
        for name in _free_weights(layers, {}):
            layers[name.rpartition(".")[0]].quant_config.check_widths(WIDTHS)
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
    blind = [start.name for start in starts if start.measures.blind]
    if blind:
        rank_zero_warn(
            f"Calibration saw only zeros in {shorten(blind)}: their steps start from the size that trained weights "
            "(1 / sqrt(inputs per output)) or inputs (1) usually have."
        )
