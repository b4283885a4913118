"""A copy of a module with what its quantizers learned baked in."""

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_qinit.insertion import QUANTIZED_LAYERS, QuantizedLayer, held, quantized_layers
from lightning_qinit.quantizers.frozen import FrozenQuantizer, Unquantized

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def fold(module: Module) -> Module:
    """A copy without learned quantizers: weights hold quantized values, inputs pass torch's own fake quantization.

    In eval mode and without gradients the copy gives the outputs of ``module`` to the last bit (on the CPU). Its state
    dict has the keys of the float model, so that its weights load into one, and
    ``torch.export.export(fold(module), sample)`` gives a program that runs without this package. Layers whose inputs
    are not quantized are torch's classes again. BatchNorm stays what it is;
    :func:`lightning_qinit.fold_batchnorm(fold(module), sample) <lightning_qinit.fold_batchnorm>` makes it part of the
    weights, up to float rounding.

    Two limits: torch's fake quantization does not keep NaN; and an ``nn.TransformerEncoderLayer`` of which only weights
    are quantized may take torch's fused path again, which rounds differently.

    Args:
        module: a calibrated module; it is not changed. Quantizers that are not calibrated, or switched off, leave
            values in float, as they do in ``module``.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: if no quantizer is calibrated, or a layer cannot be folded.
    """
    check_foldable(module)
    folded = copy.deepcopy(module).eval()
    for layer in reversed(quantized_layers(folded).values()):  # children first
        _bake_weights(layer)
        freeze(layer, frozen_inputs(layer))
    return folded


def check_foldable(module: nn.Module) -> None:
    """Raise ``ValueError``, naming the layer, if :func:`fold` cannot be exact."""
    layers = quantized_layers(module)
    if not any(quantizer.active for layer in layers.values() for quantizer in layer.quantizers().values()):
        raise ValueError(f"{type(module).__name__} has no calibrated quantizer: there is nothing to export.")
    for name, layer in layers.items():
        if getattr(layer, "max_norm", None) is not None and layer.weight_quantizers():
            raise ValueError(f"`{name}` cannot be exported: its `max_norm` changes the weight before it is quantized.")
        if is_parametrized(layer):
            raise ValueError(
                f"`{name}` cannot be exported: it is parametrized; call `torch.nn.utils.parametrize."
                "remove_parametrizations` first, which leaves the weight that is used."
            )
        if hooked := [what for what in layer.parameter_quantizers() if what not in layer._parameters]:
            raise ValueError(
                f"`{name}` cannot be exported: a hook recomputes its {hooked[0]} (pruning, spectral or weight norm); "
                "remove it first, as `torch.nn.utils.prune.remove` does, which leaves the weight that is used."
            )
        for quantizer in layer.input_quantizers().values():
            if quantizer.active:
                try:
                    FrozenQuantizer.of(quantizer)
                except ValueError as error:
                    raise ValueError(f"`{name}` cannot be exported: {error}.") from None


def freeze(layer: QuantizedLayer, inputs: Mapping[str, nn.Module]) -> None:
    """Give a layer inputs that learn no more; if none is quantized, turn it back into torch's class.

    Args:
        layer: a quantized layer.
        inputs: by name, one for each of ``layer.inputs``; empty if inputs stay in float.
    """
    layer.weight_quantizer = None
    layer.input_quantizer = held(inputs)
    # a layer with layers inside keeps its class: torch's own may use their weights without calling them
    inside = any(isinstance(child, QuantizedLayer) or type(child) in QUANTIZED_LAYERS for child in layer.children())
    if not inside and all(isinstance(frozen, Unquantized) for frozen in inputs.values()):
        del layer.weight_quantizer, layer.input_quantizer
        vars(layer).pop("quant_config", None)
        layer.__class__ = layer.float_class  # type: ignore[assignment]  # that is the point


def frozen_inputs(layer: QuantizedLayer) -> dict[str, nn.Module]:
    """By name, what each input of a layer passes from here on; empty if inputs stay in float."""
    quantizers = layer.input_quantizers()
    frozen: dict[str, nn.Module] = {}
    for name, quantizer in quantizers.items():
        if name in layer.optional_inputs and not quantizer.is_calibrated:
            quantizer = quantizers[layer.inputs[0]]  # which serves it
        frozen[name] = FrozenQuantizer.of(quantizer) if quantizer.active else Unquantized()
    return frozen


def _bake_weights(layer: QuantizedLayer) -> None:
    for name, quantizer in layer.parameter_quantizers().items():
        # a Parameter of its own, since a layer in float may be tied to the old one; without gradient, as nn.RNN takes
        # another path for weights that need one
        setattr(layer, name, nn.Parameter(quantizer(getattr(layer, name)).detach(), requires_grad=False))
