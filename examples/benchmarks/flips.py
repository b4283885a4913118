"""Where onnxruntime rounds an input to another level than the fake-quantized module does."""

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from lightning_qinit import Quantizer
from lightning_qinit.insertion import named_quantizers, quantized_layers


@dataclass(frozen=True)
class Flips:
    """How many elements of one quantized input lie on another level, as written (optimizations off).

    Attributes:
        name: of the quantizer.
        elements: how many it rounded.
        own: given the very same values to round: the quantizer alone.
        layer: given what all quantizers before it gave in torch: float operations between two quantizers, and this one.
        cascaded: with the whole network run by onnxruntime, so that one flip moves what comes after it.
        difference: of the values to round, between torch and onnxruntime as for ``layer``, relative to the greatest.
    """

    name: str
    elements: int
    own: int
    layer: int
    cascaded: int
    difference: float


def session(model: str | Path | bytes, optimized: bool = False, **entries: str) -> onnxruntime.InferenceSession:
    """Of one thread on the CPU; ``entries`` are settings of the session, with ``_`` for the dot."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    for key, value in entries.items():
        options.add_session_config_entry(key.replace("_", ".", 1), value)
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def count_flips(module: nn.Module, x: Tensor, path: str | Path) -> tuple[list[Flips], float]:
    """Count them, input by input.

    Args:
        module: a calibrated module in eval mode, with its offsets snapped.
        x: what it is called with.
        path: where :func:`~lightning_qinit.export.export_onnx` wrote it.

    Returns:
        The counts in running order, and how far the outputs of onnxruntime lie from those of the module if all
        quantized inputs are the module's, relative to the greatest output.
    """
    calls, expected = _record(module, x)
    model = onnx.load(path)
    entries = [entry.name for entry in model.graph.input]
    pairs = _quantized(model)
    if len(pairs) != len(calls):
        raise ValueError(f"`path` must be an export of `module`: it rounds {len(pairs)} inputs, and not {len(calls)}.")
    whole = _outputs(model, [out for _, out in pairs], {entries[0]: x})[1:]
    given = {entries[0]: x} | {out: call[3] for (_, out), call in zip(pairs, calls, strict=True)}
    _cut(model, {out: call[3] for (_, out), call in zip(pairs, calls, strict=True)})
    wanted = [value for before, out in pairs for value in (before, f"{out}.own")]
    output, *values = _outputs(model, wanted, given)
    flips = []
    for (name, quantizer, before, after), entered, rounded, cascaded in zip(
        calls, values[::2], values[1::2], whole, strict=True
    ):

        def other(a: Tensor, b: Tensor, half: Tensor = quantizer.step / 2) -> int:
            return int(((a - b).abs() > half).sum())

        difference = float((entered - before).abs().max() / before.abs().max())
        own, layer = other(quantizer(entered), rounded), other(after, rounded)
        flips.append(Flips(name, after.numel(), own, layer, other(after, cascaded), difference))
    return flips, float((output - expected).abs().max() / expected.abs().max())


def _record(module: nn.Module, x: Tensor) -> tuple[list[tuple[str, Quantizer, Tensor, Tensor]], Tensor]:
    """Name, quantizer, values and result of each input that is rounded, in running order, and the output."""
    calls: list[tuple[str, Quantizer, Tensor, Tensor]] = []
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(name: str, quantizer: Quantizer, before: Tensor, after: Tensor) -> None:
        # the exporter merges quantizers of one step that round the same tensor
        if not any(before is other and torch.equal(after, result) for other, result in seen):
            calls.append((name, quantizer, before.clone(), after))
        seen.append((before, after))

    hooks = [
        quantizer.register_forward_hook(lambda q, args, out, name=name: keep(name, q, args[0], out))
        for name, quantizer in named_quantizers(quantized_layers(module)).items()
        if quantizer.active and quantizer.batch_axis is not None
    ]
    try:
        return calls, module(x)
    finally:
        for hook in hooks:
            hook.remove()


def _quantized(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """What is rounded and what that gives, in running order: QuantizeLinear, perhaps Clip, DequantizeLinear."""
    producer = {name: node for node in model.graph.node for name in node.output}
    pairs = []
    for node in model.graph.node:
        code = producer.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if code is not None and code.op_type == "Clip":
            code = producer.get(code.input[0])
        if code is not None and code.op_type == "QuantizeLinear":
            pairs.append((code.input[0], node.output[0]))
    return pairs


def _cut(model: onnx.ModelProto, given: dict[str, Tensor]) -> None:
    """Take the values of these names from outside, in place; what the graph makes itself is called ``<name>.own``."""
    for node in model.graph.node:
        if node.output[0] in given:
            node.output[0] += ".own"
    kind = onnx.TensorProto.FLOAT
    model.graph.input.extend(onnx.helper.make_tensor_value_info(n, kind, list(t.shape)) for n, t in given.items())


def _outputs(model: onnx.ModelProto, more: list[str], given: dict[str, Tensor]) -> list[Tensor]:
    """The first output of a model, and the values of some names within it."""
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(more))
    names = [model.graph.output[0].name, *more]
    runtime = session(extended.SerializeToString())
    return [torch.from_numpy(value) for value in runtime.run(names, {name: t.numpy() for name, t in given.items()})]
