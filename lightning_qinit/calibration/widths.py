"""The bits of quantizers, where calibration decides: at both ends of the network, and under an average."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_qinit.calibration.allocate import allocate_bits
from lightning_qinit.calibration.data import data_of, users_of
from lightning_qinit.calibration.observe import Observation
from lightning_qinit.config import Role
from lightning_qinit.initializers import initialize
from lightning_qinit.initializers.optimal import optimal
from lightning_qinit.insertion import QuantizedLayer, named_quantizers

WIDTHS = range(2, 9)  # what `average_bits` chooses from


def bits_at_ends(layers: Mapping[str, QuantizedLayer], observation: Observation) -> dict[str, int]:
    """Bits of the quantizers of the first and the last layer to run, where the settings make an exception of them."""
    ends = {*observation.first_run[:1], *filter(None, [observation.last_run])}
    bits = {}
    for name, quantizer in named_quantizers(layers).items():
        role: Role = "weight" if quantizer.batch_axis is None else "activation"
        configs = [layers[user].quant_config for user in users_of(quantizer, layers) if user in ends]
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
    free = free_weights(layers, fixed)
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


def free_weights(layers: Mapping[str, QuantizedLayer], fixed: Mapping[str, int]) -> list[str]:
    """Quantizers of weights whose bits nothing sets."""
    return [
        name
        for name, quantizer in named_quantizers(layers).items()
        if quantizer.batch_axis is None
        and name not in fixed
        and not any("weight" in layers[user].quant_config.own_bits for user in users_of(quantizer, layers))
    ]


@dataclass(frozen=True)
class _Costs:
    """The error of a weight at every width: weighted by importance if there is any, and relative to its energy."""

    size: int
    plain: list[float]
    relative: list[float]
    importance: float | None  # the mean over its elements


def _costs(name: str, layers: Mapping[str, QuantizedLayer], observation: Observation) -> _Costs | None:
    data = data_of(name, layers, observation)
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
