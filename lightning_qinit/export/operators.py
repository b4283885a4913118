"""Two operators that ONNX has and torch has not, the modules that use them, and what they are translated to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qinit.export.extra import require
from lightning_qinit.functional.fake_quantize import broadcast_channels

TYPES = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255)}


def integer_type(low: int, high: int) -> str:
    """The narrowest integer type of ONNX that holds these codes; ``ValueError`` if 8 bits do not."""
    for name, (least, greatest) in TYPES.items():
        if least <= low and high <= greatest:
            return name
    raise ValueError(f"codes from {low} to {high} do not fit in 8 bits")


@torch.library.custom_op("lightning_qinit::quantize", mutates_args=())
def quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """``(clip(round(x / scale) + zero_point, low, high) - zero_point) * scale``."""
    step = torch.tensor(scale, dtype=x.dtype, device=x.device)
    return ((torch.round(x / step) + zero_point).clamp(low, high) - zero_point) * step


@quantize.register_fake
def _(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lightning_qinit::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, axis: int, kind: str) -> Tensor:
    """``codes * scale``, with one step, of no axes, or one per index of ``axis``; ``kind`` is the type of the codes."""
    return codes.to(scale.dtype) * broadcast_channels(scale, codes, axis)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, axis: int, kind: str) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


class IntegerInput(nn.Module):
    """An input that passes QuantizeLinear, Clip and DequantizeLinear.

    Args:
        scale: the step.
        zero_point: the code of 0, anywhere within 255 of the others.
        low: the lowest code.
        high: the highest.
    """

    def __init__(self, scale: float, zero_point: int, low: int, high: int) -> None:
        super().__init__()
        least, greatest = min(low, zero_point), max(high, zero_point)
        shift = 0 if any(a <= least and greatest <= b for a, b in TYPES.values()) else -least
        self.scale, self.zero_point, self.low, self.high = scale, zero_point + shift, low + shift, high + shift

    def forward(self, x: Tensor, samples: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Quantize ``x``; the other arguments are those of a quantizer and play no part."""
        return torch.ops.lightning_qinit.quantize(x, self.scale, self.zero_point, self.low, self.high)


class IntegerWeight(nn.Module):
    """A weight from its integers.

    Args:
        codes: index of the level of each value.
        scale: the step, ``(channels,)`` or ``(1,)``.
        levels: the levels at step 1. If they are integers of 8 bits, the graph holds them and no indices.
        channel_axis: the axis along which the channels run; ``None`` for one step.
    """

    codes: Tensor
    scale: Tensor
    levels: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, levels: Tensor, channel_axis: int | None) -> None:
        super().__init__()
        self.axis = channel_axis or 0
        self.kind = None
        low, high = float(levels[0]), float(levels[-1])
        if bool((levels == levels.round()).all()) and -128 <= low and high <= (127 if low < 0 else 255):
            self.kind = integer_type(int(levels[0]), int(levels[-1]))
            self.register_buffer("codes", levels.to(torch.uint8 if self.kind[0] == "U" else torch.int8)[codes])
            self.register_buffer("scale", scale if scale.numel() > 1 else scale.reshape(()))
        else:
            self.register_buffer("codes", codes.to(torch.uint8))
            self.register_buffer("scale", broadcast_channels(scale, codes, channel_axis))
            self.register_buffer("levels", levels.to(scale.dtype))

    def forward(self, weight: Tensor, samples: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that is stored, whatever the arguments."""
        if self.kind is None:
            return self.levels[self.codes.to(torch.int64)] * self.scale
        return torch.ops.lightning_qinit.dequantize(self.codes, self.scale, self.axis, self.kind)


def translations() -> dict[Any, Callable[..., Any]]:
    """For the ``custom_translation_table`` of ``torch.onnx.export``."""
    onnx, op = require("onnx"), require("onnxscript").opset21
    TensorProto, helper = onnx.TensorProto, onnx.helper

    def number(value: int, kind: str) -> Any:
        return op.Constant(value=helper.make_tensor("number", getattr(TensorProto, kind), (), [value]))

    def onnx_quantize(x: Any, scale: float, zero_point: int, low: int, high: int) -> Any:
        kind = integer_type(min(low, zero_point), max(high, zero_point))
        if TYPES[kind] != (low, high):  # which is clipped to, and Clip takes no 4-bit integers
            kind = "U" * (kind[0] == "U") + "INT8"
        step, zero = op.Constant(value_float=scale), number(zero_point, kind)
        code = op.QuantizeLinear(x, step, zero)
        if TYPES[kind] != (low, high):
            code = op.Clip(code, number(low, kind), number(high, kind))
        return op.DequantizeLinear(code, step, zero)

    def onnx_dequantize(codes: Any, scale: Any, axis: int, kind: str) -> Any:
        if kind.endswith("4"):  # which torch has no dtype for: see `narrow_weights`
            codes = op.Cast(codes, to=getattr(TensorProto, kind))
        return op.DequantizeLinear(codes, scale, axis=axis)

    operators = torch.ops.lightning_qinit
    return {operators.quantize.default: onnx_quantize, operators.dequantize.default: onnx_dequantize}


def narrow_weights(model: Any) -> None:
    """Store 4-bit weights as such, in place, where the graph (``onnx_ir.Model``) casts wider ones."""
    import onnx_ir as ir

    for node in list(model.graph):
        stored = node.inputs[0] if node.op_type == "Cast" else None
        if stored is not None and stored.is_initializer() and node.attributes["to"].as_int() in (21, 22):  # (U)INT4
            kind = ir.DataType(node.attributes["to"].as_int())
            (cast,) = node.outputs
            narrow = ir.Value(name=cast.name, type=ir.TensorType(kind), shape=stored.shape)
            narrow.const_value = ir.Tensor(stored.const_value.numpy().astype(kind.numpy()), name=cast.name)
            ir.convenience.replace_all_uses_with(cast, narrow)
            model.graph.remove(node, safe=True)
            model.graph.register_initializer(narrow)
