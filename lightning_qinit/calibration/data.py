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


class CalibrationData:
    """What calibration knows of every quantizer.

    Args:
        layers: the quantized layers.
        observation: what was seen of them.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer], observation: Observation) -> None:
        self.layers, self.observation = layers, observation
        self._users: dict[int, list[str]] = {}
        for name, layer in layers.items():
            for key in {id(quantizer) for quantizer in layer.quantizers().values()}:
                self._users.setdefault(key, []).append(name)

    def users_of(self, quantizer: Quantizer) -> list[str]:
        """The layers that use a quantizer: several, if their weights are tied."""
        return self._users[id(quantizer)]

    def of(self, full_name: str) -> QuantizerData | None:
        """The data of a quantizer; ``None`` if its layer never ran or it saw nothing."""
        name, _, what = full_name.rpartition(".")
        layer = self.layers[name]
        quantizer = layer.quantizers()[what]
        if not any(user in self.observation.first_run for user in self.users_of(quantizer)):
            return None
        weight = layer.weights().get(what)
        if weight is not None:
            weight = whole(weight.detach())
            # weights that start at zero (a new head, LoRA's second matrix) grow to about the size that torch's
            # layers start with, 1 / sqrt(inputs per output)
            reach = (weight.numel() / weight.shape[layer.output_axis]) ** -0.5
            weight = quantizer.transform(weight)
            sample, signed = Sample.of_tensor(weight, quantizer.channel_axis), True
        else:
            sketch = self.observation.inputs.get(full_name)
            if sketch is None or not sketch.count:
                return None
            sample, signed, reach = sketch.sample(), sketch.signed, 1.0
        weighted, note = sample, ""
        if self.observation.criterion in ("fisher", "hessian"):
            weighted, note = self._by_importance(full_name, quantizer, sample)
        elif self.observation.criterion == "output" and weight is not None:
            weighted, note = self._by_outputs(what, quantizer, sample, weight)
        return QuantizerData(sample, weighted, signed, reach, note)

    def _by_importance(self, full_name: str, quantizer: Quantizer, sample: Sample) -> tuple[Sample, str]:
        """The data weighted by importance; as they are, and a note, where none was seen."""
        importance = self._importance(full_name, quantizer)
        if importance is not None and float(importance.sum()) > 0:
            weights = Sample.of_tensor(importance, quantizer.channel_axis).values
            # a channel that nothing depends on keeps the plain optimum
            weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
            return Sample(sample.values, weights, sample.minimum, sample.maximum), ""
        sketch = self.observation.input_importance.get(full_name)
        if sketch is not None:
            weighted = sketch.sample()
            if float(weighted.energy) > 0:
                return weighted, ""
        return sample, f"no {self.observation.criterion} importance, so all values count alike"

    def _importance(self, full_name: str, quantizer: Quantizer) -> Tensor | None:
        """The importance of a weight; with tied weights, over all layers that use it."""
        seen = self.observation.weight_importance
        if self.observation.criterion == "fisher":  # the gradient of a tied weight is that of all its uses
            return seen.get(full_name)
        what = full_name.rpartition(".")[2]
        users = [f"{user}.{what}" for user in self.users_of(quantizer)]
        found = [seen[name] for name in users if name in seen]
        return torch.stack(found).sum(0) if found else None

    def _by_outputs(self, what: str, quantizer: Quantizer, sample: Sample, weight: Tensor) -> tuple[Sample, str]:
        """The data of a weight, to be judged by the outputs that it feeds; as they are, and a note, if none are known.

        Of tied weights the uses that are a product with an input count, together.
        """
        users = {name: self.layers[name] for name in self.users_of(quantizer) if self.layers[name].inputs_met(what)}
        if not users:
            return sample, "no sum over inputs known, so all values count alike"
        user = next(iter(users.values()))
        weight = weight.to(sample.values)
        moments = weight.new_zeros(len(user.inputs_met(what)), 3)
        for name, layer in users.items():
            for part, met in enumerate(layer.inputs_met(what)):
                seen = self.observation.moments_of(f"{name}.{met}")
                moments[part] += 0 if seen is None else seen.to(moments)
        shape = [1] * weight.dim()
        shape[user.output_axis] = -1
        each = weight.shape[user.output_axis] // len(moments)
        correlation = _correlation(moments).repeat_interleave(each).view(shape)
        rows = output_rows(weight, correlation, quantizer.channel_axis, user.outputs_fed(weight))
        return Sample(rows.x, rows.w, sample.minimum, sample.maximum, rows.mean, rows.output), ""


def _correlation(moments: Tensor) -> Tensor:
    """``E[a]^2 / E[a^2]`` of counts, sums and sums of squares, ``(..., 3)``."""
    count, total, squares = moments.unbind(-1)
    product = count * squares
    return torch.where(product > 0, total.square() / product, 0.0).clamp(max=MOST_ALIKE)
