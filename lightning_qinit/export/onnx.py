"""A quantized model as a standard ONNX graph of integers: QuantizeLinear and DequantizeLinear."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qinit.export.batchnorm import fold_into_steps
from lightning_qinit.export.codes import weight_codes
from lightning_qinit.export.fold import check_foldable, frozen_inputs
from lightning_qinit.export.operators import IntegerInput, IntegerWeight, narrow_weights, translations
from lightning_qinit.export.snap import snap_offsets
from lightning_qinit.insertion import held, named_quantizers, quantized_layers
from lightning_qinit.quantizers import Quantizer
from lightning_qinit.quantizers.frozen import FrozenQuantizer

OPSET = 21  # the first with 4-bit integers


@dataclass(frozen=True)
class OnnxReport:
    """What an export had to change.

    Attributes:
        zero_points: the integer zero point of each input that had an offset, by the name of its quantizer.
        change: how far their rounding moved the output for the sample: the norm of the difference relative to that of
            the output; 0 if there are no offsets.
    """

    zero_points: dict[str, int]
    change: float


@torch.no_grad()
def export_onnx(
    module: nn.Module, sample: Any, path: str | PathLike[str], batchnorm: bool = False, **options: Any
) -> OnnxReport:
    """Write a calibrated module as an ONNX file whose weights are integers.

    Weights of up to 4 bits are stored as INT4, wider ones as INT8, and pass DequantizeLinear, with a step per channel
    where they have one; levels that are no integers are looked up by their code. Inputs pass QuantizeLinear, Clip where
    the integer type holds more than the levels, and DequantizeLinear. The offset of LSQ+ becomes an integer zero point
    (see :func:`~lightning_qinit.export.snap_offsets`).

    Runtimes divide by the step where torch multiplies with its reciprocal, so a value on a rounding boundary may go to
    the neighbouring level. Turn the optimizations of a runtime off to compare: some compute in integers and round in
    other places.

    Args:
        module: a calibrated module in float32; it is not changed.
        sample: what the module is called with: a tensor, a tuple or list of arguments, or a mapping of keyword
            arguments.
        path: where to write.
        batchnorm: fold BatchNorm into the steps and the bias of the convolution before it, where the codes of input and
            weight have 8 bits. This changes outputs by float rounding only and lets runtimes with integer kernels use
            them; those round the bias, and so may differ by a little more.
        **options: passed on to ``torch.onnx.export``, such as ``input_names`` or ``dynamic_shapes``.

    Returns:
        What rounding the offsets changed.

    Raises:
        ValueError: if no quantizer is calibrated, the module is not in float32, or a layer cannot be exported. Nothing
            is written then.
        ModuleNotFoundError: without the packages of the extra ``export``.
    """
    check_foldable(module)
    check_inputs(module)
    check_float32(module)
    table = translations()
    args = () if isinstance(sample, Mapping) else tuple(sample) if isinstance(sample, (tuple, list)) else (sample,)
    kwargs = dict(sample) if isinstance(sample, Mapping) else {}
    exported = copy.deepcopy(module).eval()
    zero_points, change = snap_offsets(exported), 0.0
    if zero_points:
        change = _distance(copy.deepcopy(module).eval()(*args, **kwargs), exported(*args, **kwargs))
    _to_integers(exported)
    settings = {"opset_version": OPSET, "verbose": False, "custom_translation_table": table, **options}
    with warnings.catch_warnings():  # which torch gives for every recurrent layer
        warnings.filterwarnings("ignore", message=r"(?s)The tensor attributes? .*_flat_weights")
        program: Any = torch.onnx.export(exported, args, kwargs=kwargs, dynamo=True, **settings)
    narrow_weights(program.model)
    if batchnorm:
        fold_into_steps(program.model)
    initializers = program.model.graph.initializers
    for name in [name for name, value in initializers.items() if not value.uses()]:
        del initializers[name]
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, longer than the graph and full of local paths
    program.save(path)
    return OnnxReport(zero_points, change)


def check_float32(module: nn.Module) -> None:
    """Raise ``ValueError``, naming the layer, if a weight is not in float32: the steps in the graph are."""
    for name, layer in quantized_layers(module).items():
        for weight in layer.weights().values():
            if weight.dtype != torch.float32:
                raise ValueError(
                    f"The layer {name!r} is in {str(weight.dtype).removeprefix('torch.')}, and ONNX export takes "
                    "modules in float32: use `module.float()`, or a Trainer with another `precision`."
                )


def check_inputs(module: nn.Module) -> None:
    """Raise ``ValueError``, naming the quantizer, if an input has levels that QuantizeLinear does not have."""
    for name, quantizer in named_quantizers(quantized_layers(module)).items():
        if quantizer.active and quantizer.batch_axis is not None and not quantizer.uniform:
            kind = type(quantizer).__name__
            raise ValueError(
                f"`{name}` cannot be exported: the levels of its {kind} are not consecutive integers, which "
                "QuantizeLinear rounds to; use 'lsq', 'lsq+' or 'pact' with 2 bits or more for inputs (weights are "
                "looked up)."
            )


def _to_integers(module: nn.Module) -> None:
    """Put integers in the place of all quantizers of a module."""
    for layer_name, layer in quantized_layers(module).items():
        frozen = frozen_inputs(layer)
        inputs = {name: _integer_input(f) if isinstance(f, FrozenQuantizer) else f for name, f in frozen.items()}
        weights = {
            name: _integer_weight(quantizer, getattr(layer, name), f"{layer_name}.{name}")
            for name, quantizer in layer.parameter_quantizers().items()
        }
        layer.weight_quantizer, layer.input_quantizer = held(weights), held(inputs)


def _integer_input(frozen: FrozenQuantizer) -> IntegerInput:
    zero_point = 0 if frozen.offset is None else round(-frozen.offset / frozen.scale)
    return IntegerInput(frozen.scale, zero_point, int(frozen.levels[0]), int(frozen.levels[-1]))


def _integer_weight(quantizer: Quantizer, weight: Tensor, name: str) -> nn.Module:
    if not quantizer.active:
        return quantizer
    return IntegerWeight(*weight_codes(quantizer, weight, name), quantizer.channel_axis)


def _distance(before: Any, after: Any) -> float:
    """Of all tensors in two outputs of one structure."""
    first, second = (
        [t.flatten().double() for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]
        for output in (before, after)
    )
    return float((torch.cat(first) - torch.cat(second)).norm() / torch.cat(first).norm())
