"""A quantized model as integers: packed codes, steps and zero points."""

import copy
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_qinit.batchnorm import fold_alike
from lightning_qinit.export.codes import weight_codes
from lightning_qinit.export.extra import require
from lightning_qinit.export.fold import fold, freeze, frozen_inputs
from lightning_qinit.export.packing import pack, unpack
from lightning_qinit.functional.fake_quantize import broadcast_channels
from lightning_qinit.functional.levels import is_run
from lightning_qinit.insertion import QUANTIZED_LAYERS, QuantizedLayer, call_layers
from lightning_qinit.quantizers import Quantizer
from lightning_qinit.quantizers.frozen import FrozenQuantizer, Unquantized

Module = TypeVar("Module", bound=nn.Module)
PARTS = ("codes", "scale", "zero_point", "levels", "offset", "layout")


@torch.no_grad()
def integer_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state of a quantized module with its weights as packed integers, on the CPU.

    A quantized weight ``<key>`` is there as

    - ``<key>.codes``: uint8, ``bits`` bytes for eight codes, the first code in the lowest bits;
    - ``<key>.scale``: the step, ``(channels,)`` or ``(1,)``;
    - ``<key>.zero_point``: int64, of no axes: the value is ``(code - zero_point) * scale``; or, if the levels are not
      consecutive integers, ``<key>.levels``: the value is ``levels[code] * scale``;
    - ``<key>.layout``: int64, ``(bits, channel axis or -1, *shape)``.

    A quantized input is there as ``<layer>.input.scale``, ``.zero_point`` or ``.levels``, ``.layout``
    ``(bits, number of levels)``, and for LSQ+ ``.offset``, which is added to the value; of layers with several inputs
    as ``<layer>.query`` and so on. All else keeps its key and dtype.

    Args:
        module: a calibrated module; it is not changed.

    Raises:
        ValueError: if no quantizer is calibrated, or a layer cannot be exported.
    """
    state = {key: value for key, value in fold(module).state_dict().items() if isinstance(value, Tensor)}
    for name, layer in module.named_modules(remove_duplicate=False):
        if not isinstance(layer, QuantizedLayer):
            continue
        for weight, quantizer in layer.parameter_quantizers().items():
            if quantizer.active:
                key = _joined(name, weight)
                del state[key]
                parts = _packed(quantizer, getattr(layer, weight), key)
                state |= {f"{key}.{part}": value for part, value in parts.items()}
        for what, frozen in frozen_inputs(layer).items():
            if isinstance(frozen, FrozenQuantizer):
                state |= {f"{_joined(name, what)}.{part}": value for part, value in _numbers(frozen).items()}
    # safetensors takes no other order in memory
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def save_integers(module: nn.Module, path: str | PathLike[str]) -> None:
    """Write :func:`integer_state_dict` to a safetensors file (of the extra ``export``)."""
    require("safetensors.torch").save_file(integer_state_dict(module), Path(path))


@torch.no_grad()
def load_integers(module: Module, state: Mapping[str, Tensor] | str | PathLike[str]) -> Module:
    """A copy of a float module with the weights and the input quantizers of an integer state.

    It gives the outputs of the folded module to the last bit.

    Args:
        module: the float model that was quantized, with any weights; it is not changed.
        state: what :func:`integer_state_dict` returned, or the path of a file that :func:`save_integers` wrote.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: if ``module`` has quantizers.
        RuntimeError: if keys or shapes do not fit, as of ``load_state_dict``.
    """
    left = dict(state if isinstance(state, Mapping) else require("safetensors.torch").load_file(Path(state)))
    if any(isinstance(layer, QuantizedLayer) for layer in module.modules()):
        raise ValueError(f"`module` must be the float model, got a {type(module).__name__} with quantized layers.")
    loaded = copy.deepcopy(module).eval()
    fold_alike(loaded, left)
    named = [(name, m) for name, m in loaded.named_modules(remove_duplicate=False) if type(m) in QUANTIZED_LAYERS]
    for name, layer in reversed(named):  # children first
        kind = QUANTIZED_LAYERS.get(type(layer), type(layer))  # one that has two names is done already under the second
        weights = [weight for weight in kind.weight_names(layer) if f"{_joined(name, weight)}.codes" in left]
        for weight in weights:
            key = _joined(name, weight)
            # as folding does: in a Parameter of its own, without gradient
            setattr(layer, weight, nn.Parameter(torch.empty_like(getattr(layer, weight)), requires_grad=False))
            left[key] = _unpacked(key, _taken(left, key))
        inputs = {what: _thawed(_taken(left, _joined(name, what))) for what in kind.inputs}
        if weights or not all(isinstance(frozen, Unquantized) for frozen in inputs.values()):
            layer.__class__ = kind
            freeze(layer, inputs)
    call_layers(loaded)
    loaded.load_state_dict(left)
    return loaded


def _joined(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _taken(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {part: state.pop(f"{key}.{part}") for part in PARTS if f"{key}.{part}" in state}


def _packed(quantizer: Quantizer, weight: Tensor, key: str) -> dict[str, Tensor]:
    codes, scale, levels = weight_codes(quantizer, weight, key)
    axis, bits = quantizer.channel_axis, (len(levels) - 1).bit_length()
    layout = torch.tensor([bits, -1 if axis is None else axis, *weight.shape])
    return {"codes": pack(codes, bits), "scale": scale, "layout": layout, **_grid(levels)}


def _unpacked(key: str, parts: dict[str, Tensor]) -> Tensor:
    if not {"codes", "scale", "layout"} <= parts.keys() or not parts.keys() & {"levels", "zero_point"}:
        raise RuntimeError(
            f"The state of {key!r} must hold codes, scale, layout and levels or zero_point, got {[*parts]}."
        )
    bits, axis, *shape = parts["layout"].tolist()
    count = torch.Size(shape).numel()
    expected, found = -(-count // 8) * bits, parts["codes"].numel()
    if not 1 <= bits <= 8 or found != expected:
        raise RuntimeError(f"`{key}.codes` must be {expected} bytes, {count} codes of {bits} bits, got {found}.")
    codes = unpack(parts["codes"], bits, count).view(shape).to(torch.int64)
    scale = parts["scale"]
    level = parts["levels"][codes] if "levels" in parts else codes - parts["zero_point"]
    return level.to(scale.dtype) * broadcast_channels(scale, codes, None if axis < 0 else axis)


def _numbers(frozen: FrozenQuantizer) -> dict[str, Tensor]:
    levels = torch.tensor(frozen.levels, dtype=torch.float64)
    numbers = {"scale": torch.tensor([frozen.scale]), **_grid(levels)}
    if frozen.offset is not None:
        numbers["offset"] = torch.tensor([frozen.offset])
    return numbers | {"layout": torch.tensor([(len(levels) - 1).bit_length(), len(levels)])}


def _thawed(numbers: dict[str, Tensor]) -> nn.Module:
    """The input quantizer of these numbers."""
    if not numbers:
        return Unquantized()
    count = int(numbers["layout"][1])
    uniform = "zero_point" in numbers
    levels = torch.arange(count) - numbers["zero_point"] if uniform else numbers["levels"]
    offset = float(numbers["offset"]) if "offset" in numbers else None
    return FrozenQuantizer(float(numbers["scale"]), levels.to(torch.float64).tolist(), offset, uniform)


def _grid(levels: Tensor) -> dict[str, Tensor]:
    return {"zero_point": -levels[0].to(torch.int64)} if is_run(levels) else {"levels": levels}
