"""From what calibration sees to the steps: everything is planned first, and the module changed when all is known."""

from collections.abc import Callable, Iterable, Mapping

from lightning_qinit.calibration.batchnorm import Statistics, set_statistics
from lightning_qinit.calibration.config import Criterion
from lightning_qinit.calibration.data import CalibrationData
from lightning_qinit.calibration.observe import Observation
from lightning_qinit.calibration.start import Start, plan
from lightning_qinit.calibration.widths import WIDTHS, average_bits, bits_at_ends, free_weights
from lightning_qinit.functional.sharded import whole
from lightning_qinit.insertion import QuantizedLayer, named_quantizers

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
        for name in free_weights(layers):
            layers[name.rpartition(".")[0]].quant_config.check_widths(WIDTHS)
    observation = watch(layers, criterion)
    data = CalibrationData(layers, observation)
    bits = bits_at_ends(data)
    if average is not None:
        bits |= average_bits(data, average, bits)
    if not sequential:
        return plan(data, bits), observation
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
        for start in plan(data, bits, now):
            start.apply()
            starts.append(start)
        waiting = {full_name: quantizer for full_name, quantizer in waiting.items() if full_name not in now}
    return starts, observation


def settle(starts: Iterable[Start], statistics: Statistics) -> None:
    """Put what was chosen into the module."""
    for start in starts:
        start.apply()
    set_statistics(statistics)


def check_weights(layers: Mapping[str, QuantizedLayer]) -> None:
    """Raise ``ValueError`` naming the first layer whose weight holds NaN or infinite values."""
    for name, layer in layers.items():
        for weight in layer.weights().values():
            bad = int((~whole(weight.detach()).isfinite()).sum())
            if bad:
                raise ValueError(
                    f"The weight of layer {name!r} holds {bad} NaN or infinite values; a step needs finite weights."
                )
