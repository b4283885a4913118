"""Which layers of a module are quantized, and how they become so and back."""

from collections.abc import Container, Iterator, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_qinit.config import LayerConfig, QuantConfig, plain_layer, plain_weight
from lightning_qinit.insertion.layers import QUANTIZED_LAYERS, QuantizedLayer, held
from lightning_qinit.quantizers import Quantizer
from lightning_qinit.quantizers.frozen import refuse_frozen
from lightning_qinit.quantizers.kernels import Kernels


def insert(module: nn.Module, config: QuantConfig, complete: bool = True, kernels: Kernels | None = None) -> None:
    """Turn the layers that ``config`` asks for into quantized ones, in place; those that are stay untouched.

    Args:
        module: any module.
        config: what to quantize and how.
        complete: whether the module has all its layers by now. If not, a pattern may match none of them yet.
        kernels: how all quantizers compute from now on, those that there were included; ``None`` leaves them as they
            are, which is ``"auto"`` for new ones.

    Raises:
        ValueError: if a pattern matches no layer, or the module has none to quantize, or was folded. Nothing is changed
            then.
    """
    refuse_frozen(module)
    if complete:
        _refuse_lazy(module)
    candidates = dict(_candidates(module))
    if complete:
        config.check_patterns(candidates)
    chosen = _chosen(candidates, config)
    _check_same_settings(candidates, chosen)
    if complete and not chosen:
        types = ", ".join(layer.__name__ for layer in QUANTIZED_LAYERS)
        reason = f"none is of type {types}" if not candidates else "`skip` or `overrides` leave all of them in float"
        raise ValueError(f"{type(module).__name__} has no layer to quantize: {reason}.")
    shared = _shared_weights(candidates, chosen)
    for name, settings in chosen.items():
        layer = candidates[name]
        if isinstance(layer, QuantizedLayer):
            vars(layer)["quant_config"] = settings  # other initializers, for quantizers that are still to start
            _share(layer, shared)
        else:
            _quantize_layer(layer, settings, shared)
    call_layers(module)
    if kernels is not None:
        for quantizer in named_quantizers(quantized_layers(module)).values():
            quantizer.kernels = kernels


def _refuse_lazy(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if any(is_lazy(parameter) for parameter in child.parameters(recurse=False)):
            raise ValueError(
                f"The parameters of layer {name!r} have no shape yet, since it is lazy: run the module on a batch "
                "before it is quantized."
            )


def _check_same_settings(candidates: Mapping[str, nn.Module], chosen: Mapping[str, LayerConfig]) -> None:
    """Refuse other settings for layers that are quantized already; initializers may differ."""
    for name, layer in candidates.items():
        if isinstance(layer, QuantizedLayer):
            theirs = plain_layer(layer.quant_config)
            asked = plain_layer(chosen[name]) if name in chosen else None
            if asked != theirs:
                other = {key: value for key, value in (asked or {}).items() if theirs[key] != value}
                wanted = f"now {other}" if asked else "now to be left in float"
                had = {key: theirs[key] for key in other} if asked else theirs
                raise ValueError(
                    f"The layer {name!r} is quantized already, with {had}, {wanted}: a quantized module keeps its "
                    "settings. Use the same, or start from the float module."
                )


def _shared_weights(candidates: Mapping[str, nn.Module], chosen: Mapping[str, LayerConfig]) -> dict[int, Quantizer]:
    """Quantizers that there are already, by the id of their weight: tied weights share one."""
    shared: dict[int, Quantizer] = {}
    of_weight: dict[int, tuple[str, LayerConfig]] = {}
    for name, settings in chosen.items():
        layer = candidates[name]
        there = layer.parameter_quantizers() if isinstance(layer, QuantizedLayer) else {}
        for weight_name in _kind(layer).weight_names(layer):
            weight = getattr(layer, weight_name)
            if there and not isinstance(weight, nn.Parameter):
                continue  # computed for every use
            other, theirs = of_weight.setdefault(id(weight), (name, settings))
            if plain_weight(theirs) != plain_weight(settings):
                raise ValueError(
                    f"The layers {other!r} and {name!r} share a weight, so the settings of weights must be the same."
                )
            if weight_name in there:
                shared.setdefault(id(weight), there[weight_name])
    return shared


def _share(layer: QuantizedLayer, shared: Mapping[int, Quantizer]) -> None:
    """Give weights that were tied after their layers were quantized one quantizer."""
    own = layer.parameter_quantizers()
    common = {name: shared.get(id(getattr(layer, name)), quantizer) for name, quantizer in own.items()}
    if any(common[name] is not quantizer and not quantizer.is_calibrated for name, quantizer in own.items()):
        layer.weight_quantizer = held(common)


def remove(module: nn.Module, keep: Container[str] = ()) -> None:
    """Turn every quantized layer back into the float layer it was, in place; its trained weight stays.

    Args:
        module: any module.
        keep: names of layers that stay quantized.
    """
    for name, layer in quantized_layers(module).items():
        if name in keep:
            continue
        del layer.weight_quantizer, layer.input_quantizer, layer.quant_config
        layer.__class__ = layer.float_class  # type: ignore[assignment]  # that is the point
    for encoder in _encoders(module):
        if hasattr(encoder, "used_nested_tensor") and not quantized_layers(encoder):
            encoder.use_nested_tensor = True
            del encoder.used_nested_tensor


def call_layers(module: nn.Module) -> None:
    """Have encoders call their quantized layers: in eval mode they would pack padded sequences for a fused path."""
    for encoder in _encoders(module):
        if quantized_layers(encoder) and encoder.use_nested_tensor:
            vars(encoder).update(use_nested_tensor=False, used_nested_tensor=True)


def _encoders(module: nn.Module) -> list[nn.TransformerEncoder]:
    return [child for child in module.modules() if isinstance(child, nn.TransformerEncoder)]


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a module by name; a layer shared by several parents has its first name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}


def named_quantizers(layers: Mapping[str, QuantizedLayer]) -> dict[str, Quantizer]:
    """Quantizers by their logged name, ``<layer>.weight`` and ``<layer>.input``; one that layers share, once."""
    named = {f"{name}.{what}": q for name, layer in layers.items() for what, q in layer.quantizers().items()}
    first = {id(quantizer): name for name, quantizer in reversed(named.items())}
    return {name: quantizer for name, quantizer in named.items() if first[id(quantizer)] == name}


def copy_quantizers(module: nn.Module, copy: nn.Module) -> None:
    """Put the state of all quantizers, and of normalization layers, into a copy of their module."""
    for name, child in module.named_modules():
        if isinstance(child, (Quantizer, _NormBase)):
            copy.get_submodule(name).load_state_dict(child.state_dict())


def float_parameters(module: nn.Module) -> list[str]:
    """Names of the matrices and tensors that stay in float: no rule covers them, or the settings leave them."""
    covered = {id(weight) for layer in quantized_layers(module).values() for weight in layer.weights().values()}
    return [name for name, p in module.named_parameters() if p.dim() > 1 and id(p) not in covered]


def _candidates(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    metrics = [name + "." for name, child in module.named_modules() if isinstance(child, Metric)]
    for name, child in module.named_modules():
        # networks inside a metric (FID, LPIPS, ...) measure the model and are no part of it
        if name.startswith(tuple(metrics)):
            continue
        kind = QUANTIZED_LAYERS.get(type(child))
        if isinstance(child, QuantizedLayer) or (kind is not None and kind.accepts(child)):
            yield name, child


def _kind(layer: nn.Module) -> type[QuantizedLayer]:
    """The class of a quantized layer, or that which it would have."""
    return type(layer) if isinstance(layer, QuantizedLayer) else QUANTIZED_LAYERS[type(layer)]


def _chosen(candidates: Mapping[str, nn.Module], config: QuantConfig) -> dict[str, LayerConfig]:
    chosen = {name: settings for name in candidates if (settings := config.of_layer(name)) is not None}
    for name in [name for name, settings in chosen.items() if settings.weight_bits is None]:
        if not _kind(candidates[name]).inputs:  # of an embedding nothing is left to quantize
            del chosen[name]
    for name, layer in candidates.items():
        # attention in float uses the weight of its output projection without calling that layer
        if isinstance(layer, nn.MultiheadAttention) and name not in chosen:
            chosen.pop(f"{name}.out_proj", None)
    return chosen


def _quantize_layer(layer: nn.Module, config: LayerConfig, shared: dict[int, Quantizer]) -> None:
    quantized = QUANTIZED_LAYERS[type(layer)]
    weights = {name: getattr(layer, name) for name in quantized.weight_names(layer)}
    device = next(iter(weights.values())).device
    of_weights: dict[str, nn.Module] = {}
    of_inputs: dict[str, nn.Module] = {}
    if config.weight_bits is not None:
        make, axis = config.make_quantizer("weight"), quantized.output_axis
        for weight in weights.values():
            channels, channel_axis = (weight.shape[axis], axis) if config.per_channel else (1, None)
            if id(weight) not in shared:
                shared[id(weight)] = make(config.weight_bits, channels, channel_axis, device=device)
        of_weights = {name: shared[id(weight)] for name, weight in weights.items()}
    if config.activation_bits is not None and quantized.inputs:
        make, axis = config.make_quantizer("activation"), quantized.batch_axis(layer)
        of_inputs = {name: make(config.activation_bits, batch_axis=axis, device=device) for name in quantized.inputs}
    for attribute, named in (("weight_quantizer", of_weights), ("input_quantizer", of_inputs)):
        quantizers = held(named)
        layer.register_module(attribute, quantizers)
        # pruning, spectral and weight norm recompute a weight from parameters that they put beside it
        learned = [p for p_name, p in layer.named_parameters(recurse=False) if p_name.startswith(tuple(weights))]
        if quantizers is not None and not any(p.requires_grad for p in learned or weights.values()):
            quantizers.requires_grad_(False)  # a frozen layer stays frozen as a whole
    layer.__class__ = quantized
    vars(layer)["quant_config"] = config  # no parameter, buffer or module: past nn.Module's own bookkeeping
