"""The data that the step of a quantizer is chosen for, as the criterion weighs them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qinit.calibration.observe import Observation
from lightning_qinit.functional.output import output_rows
from lightning_qinit.functional.sample import Sample
from lightning_qinit.functional.sharded import whole
from lightning_qinit.insertion import QuantizedLayer
from lightning_qinit.quantizers import Quantizer

MOST_ALIKE = 0.99  # inputs that are one constant would leave the errors of single weights without a cost


@dataclass(frozen=True)
class QuantizerData:
    """What there is to go by.

    Attributes:
        sample: the values.
        weighted: the same as the criterion weighs them; ``sample`` itself, if it does not.
        signed: whether levels have to reach below zero.
        reach: the size that values usually have, where all are zero.
        note: why they are not weighed, for the report.
    """

    sample: Sample
    weighted: Sample
    signed: bool
    reach: float
    note: str


def data_of(full_name: str, layers: Mapping[str, QuantizedLayer], observation: Observation) -> QuantizerData | None:
    """The data of a quantizer; ``None`` if its layer never ran or it saw nothing."""
    name, _, what = full_name.rpartition(".")
    layer, weights = layers[name], layers[name].weights()
    quantizer = layer.quantizers()[what]
    if not any(user in observation.first_run for user in users_of(quantizer, layers)):
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
    return QuantizerData(sample, weighted, signed, reach, note)


def users_of(quantizer: Quantizer, layers: Mapping[str, QuantizedLayer]) -> list[str]:
    """The layers that use a quantizer: several, if their weights are tied."""
    return [name for name, layer in layers.items() if any(q is quantizer for q in layer.quantizers().values())]


def _importance(name: str, layers: Mapping[str, QuantizedLayer], observation: Observation) -> Tensor | None:
    """The importance of a weight; with tied weights, over all layers that use it."""
    seen = observation.weight_importance
    if observation.criterion == "fisher":  # the gradient of a tied weight is that of all its uses
        return seen.get(name)
    layer, _, what = name.rpartition(".")
    users = users_of(layers[layer].quantizers()[what], layers)
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
    users = [user for user in users_of(quantizer, layers) if layers[user].inputs_met(what)]
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
