"""The bits of quantizers, where calibration decides: at both ends of the network, and under an average."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_qinit.calibration.allocate import allocate_bits
from lightning_qinit.calibration.data import CalibrationData
from lightning_qinit.config import Role
from lightning_qinit.initializers import initialize
from lightning_qinit.initializers.optimal import optimal
from lightning_qinit.insertion import QuantizedLayer, named_quantizers

WIDTHS = range(2, 9)  # what `average_bits` chooses from


def bits_at_ends(data: CalibrationData) -> dict[str, int]:
    """Bits of the quantizers of the first and the last layer to run, where the settings make an exception of them."""
    ends = {*data.observation.first_run[:1], *filter(None, [data.observation.last_run])}
    bits = {}
    for name, quantizer in named_quantizers(data.layers).items():
        role: Role = "weight" if quantizer.batch_axis is None else "activation"
        configs = [data.layers[user].quant_config for user in data.users_of(quantizer) if user in ends]
        if configs and role not in configs[0].own_bits and configs[0].first_last_bits is not None:
            bits[name] = configs[0].first_last_bits
    return bits


def average_bits(data: CalibrationData, average: float, fixed: Mapping[str, int]) -> dict[str, int]:
    """Bits of weights, 2 to 8, of least total error under an average over all of their elements.

    The error of a weight at each width is that of its own step there: relative to the weight's energy, or, with a
    criterion, weighted by importance; a weight without importance counts with the mean importance of the others.
    Weights whose bits are set by ``overrides`` or by ``first_last_bits`` keep them and do not count.
    """
    free = [name for name in free_weights(data.layers) if name not in fixed]
    costs = {name: cost for name in free if (cost := _costs(name, data)) is not None}
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


def free_weights(layers: Mapping[str, QuantizedLayer]) -> list[str]:
    """Quantizers of weights whose bits `overrides` do not set, in any layer that uses them."""
    own = {
        id(quantizer)
        for layer in layers.values()
        if "weight" in layer.quant_config.own_bits
        for quantizer in layer.quantizers().values()
    }
    named = named_quantizers(layers)
    return [name for name, quantizer in named.items() if quantizer.batch_axis is None and id(quantizer) not in own]


@dataclass(frozen=True)
class _Costs:
    """The error of a weight at every width: weighted by importance if there is any, and relative to its energy."""

    size: int
    plain: list[float]
    relative: list[float]
    importance: float | None  # the mean over its elements


def _costs(full_name: str, calibration: CalibrationData) -> _Costs | None:
    data = calibration.of(full_name)
    if data is None:
        return None
    name, _, what = full_name.rpartition(".")
    layer = calibration.layers[name]
    quantizer, rule = layer.quantizers()[what], layer.quant_config.initializer_of("weight")
    energy = float(data.sample.energy.sum())
    has_importance = data.weighted is not data.sample and calibration.observation.criterion != "output"
    plain = []
    for width in WIDTHS:
        levels = quantizer.level_set(width, signed=True)
        chosen = initialize(rule, data.weighted if rule is optimal else data.sample, levels)
        plain.append(float(data.weighted.error(levels, chosen.step).sum()))
    importance = float(data.weighted.count.sum()) / data.sample.values.numel() if has_importance else None
    relative = [error / energy if energy > 0 else 0.0 for error in plain]
    return _Costs(data.sample.values.numel(), plain, relative, importance)
