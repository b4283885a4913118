"""BatchNorm as part of the step of the convolution before it."""

from typing import Any

import numpy as np

MOST = 2**30  # of a bias in units of both steps: runtimes store it as a 32-bit integer


def fold_into_steps(model: Any) -> None:
    """Fold BatchNormalization into the steps and the bias of convolutions of 8-bit codes, in place.

    The codes stay: ``(w * codes) * x`` followed by ``g * (. - m) + b`` is a convolution of the same codes with the step
    ``w * g`` and the bias ``b - g * m``. Runtimes with integer kernels look for nothing between the convolution and the
    quantizer after it. They round the bias to a multiple of the product of both steps, which is little at 8 bits only;
    for fewer there are no kernels, but onnxruntime rounds the bias all the same, so BatchNorm stays there, as it does
    where a multiple would need more than 32 bits.

    Args:
        model: an ``onnx_ir.Model``. What it no longer uses stays among its initializers.
    """
    for norm in list(model.graph):
        conv = norm.inputs[0].producer() if norm.op_type == "BatchNormalization" else None
        if conv is None or conv.op_type != "Conv" or len(conv.outputs[0].uses()) != 1:
            continue
        if any(conv.outputs[0] is output for output in model.graph.outputs):  # which is no use
            continue
        weight = conv.inputs[1].producer()
        constants = [_constant(value) for value in norm.inputs[1:]]
        bias = _constant(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else 0.0
        step = _constant(weight.inputs[1]) if weight is not None and weight.op_type == "DequantizeLinear" else None
        if step is None or bias is None or any(value is None for value in constants):
            continue  # no integers, or numbers that are computed
        if not (_bytes(weight.inputs[0]) and _bytes(conv.inputs[0])):
            continue
        gain, shift, mean, variance = constants
        factor = gain / np.sqrt(variance + norm.attributes["epsilon"].as_float())
        steps, moved = step * factor, shift + (bias - mean) * factor
        if not (np.abs(moved) < MOST * _input_step(conv.inputs[0]) * np.abs(steps)).all():
            continue  # a channel whose gain is next to nothing
        scale, offset = _initializers(model, norm.name, steps, moved)
        _replace(model, weight, scale, conv, norm, offset)


def _bytes(value: Any) -> bool:
    """Whether these are codes of 8 bits, or come from such."""
    import onnx_ir as ir

    producer = value.producer()
    if producer is None or producer.op_type == "QuantizeLinear":
        return value.dtype in (ir.DataType.INT8, ir.DataType.UINT8)
    return producer.op_type in ("DequantizeLinear", "MaxPool", "Relu") and _bytes(producer.inputs[0])


def _input_step(value: Any) -> Any:
    """The step of the codes that an input comes from."""
    node = value.producer()
    return _constant(node.inputs[1]) if node.op_type == "DequantizeLinear" else _input_step(node.inputs[0])


def _constant(value: Any) -> Any:
    return None if value is None or value.const_value is None else value.const_value.numpy().astype(np.float64)


def _initializers(model: Any, name: str, *arrays: Any) -> list[Any]:
    import onnx_ir as ir

    values = []
    for part, array in zip(("scale", "bias"), arrays, strict=True):
        tensor: Any = ir.tensor(array.astype(np.float32), name=f"{name}.{part}")
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        model.graph.register_initializer(value)
        values.append(value)
    return values


def _replace(model: Any, weight: Any, scale: Any, conv: Any, norm: Any, bias: Any) -> None:
    """Put a new weight and a new convolution in the place of the normalization."""
    import onnx_ir as ir

    dequantize = ir.node("DequantizeLinear", [weight.inputs[0], scale], {"axis": 0})  # output channels
    convolve = ir.Node("", "Conv", [conv.inputs[0], dequantize.outputs[0], bias], list(conv.attributes.values()))
    name = norm.outputs[0].name  # a weight may be shared, its normalization is not
    folded = ("weight", dequantize.outputs[0], weight.outputs[0]), ("folded", convolve.outputs[0], norm.outputs[0])
    for part, new, old in folded:
        new.name, new.type, new.shape = f"{name}.{part}", old.type, old.shape
    model.graph.insert_before(norm, [dequantize, convolve])
    ir.convenience.replace_all_uses_with(norm.outputs[0], convolve.outputs[0], replace_graph_outputs=True)
    unused = [norm, conv] + ([weight] if len(weight.outputs[0].uses()) == 1 else [])
    model.graph.remove(unused, safe=True)
