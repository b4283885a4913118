"""Which layers of a module are quantized, and how they become so and back."""

from collections.abc import Iterator

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_qinit.config import LayerConfig, QuantConfig
from lightning_qinit.insertion.layers import QUANTIZED_LAYERS, QuantizedLayer


def insert(module: nn.Module, config: QuantConfig, complete: bool = True) -> dict[str, QuantizedLayer]:
    """Turn the layers that ``config`` asks for into quantized ones, in place; those that are stay untouched.

    Args:
        module: any module.
        config: what to quantize and how.
        complete: whether the module has all its layers by now. If not, a pattern may match none of them yet.

    Returns:
        All quantized layers of the module by name.

    Raises:
        ValueError: if a pattern matches no layer, or the module has none to quantize. Nothing is changed then.
    """
    candidates = dict(_candidates(module))
    if complete:
        config.check_patterns(candidates)
    chosen = {name: settings for name in candidates if (settings := config.of_layer(name)) is not None}
    if complete and not chosen:
        types = ", ".join(layer.__name__ for layer in QUANTIZED_LAYERS)
        reason = f"none is of type {types}" if not candidates else "`skip` or `overrides` leave all of them in float"
        raise ValueError(f"{type(module).__name__} has no layer to quantize: {reason}.")
    for name, settings in chosen.items():
        if not isinstance(candidates[name], QuantizedLayer):
            _quantize_layer(candidates[name], settings)
    return quantized_layers(module)


def remove(module: nn.Module) -> None:
    """Turn every quantized layer back into the float layer it was, in place; its trained weight stays."""
    for layer in quantized_layers(module).values():
        del layer.weight_quantizer, layer.input_quantizer, layer.quant_config
        layer.__class__ = layer.float_class  # type: ignore[assignment]  # that is the point


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a module by name; a layer shared by several parents has its first name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}


def float_parameters(module: nn.Module) -> list[str]:
    """Names of the matrices and tensors that stay in float: no rule covers them, or the settings leave them."""
    covered = {id(layer.weight) for layer in quantized_layers(module).values() if layer.weight_quantizer is not None}
    return [name for name, p in module.named_parameters() if p.dim() > 1 and id(p) not in covered]


def _candidates(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    metrics = [name + "." for name, child in module.named_modules() if isinstance(child, Metric)]
    for name, child in module.named_modules():
        # networks inside a metric (FID, LPIPS, ...) measure the model and are no part of it
        if name.startswith(tuple(metrics)):
            continue
        if type(child) in QUANTIZED_LAYERS or isinstance(child, QuantizedLayer):
            yield name, child


def _quantize_layer(layer: nn.Module, config: LayerConfig) -> None:
    quantized = QUANTIZED_LAYERS[type(layer)]
    weight: Tensor = layer.weight  # type: ignore[assignment]  # every type in the table has one
    quantizer, axis = config.quantizer_class, quantized.output_axis
    layer.register_module("weight_quantizer", None)
    layer.register_module("input_quantizer", None)
    if config.weight_bits is not None:
        channels, channel_axis = (weight.shape[axis], axis) if config.per_channel else (1, None)
        layer.weight_quantizer = quantizer(config.weight_bits, channels, channel_axis, device=weight.device)
    if config.activation_bits is not None:
        layer.input_quantizer = quantizer(config.activation_bits, batch_axis=0, device=weight.device)
    layer.__class__ = quantized
    layer.quant_config = config  # type: ignore[assignment]
