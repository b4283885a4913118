"""BatchNorm as part of the layer before it: what is quantized and trained is the folded weight."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_qinit.calibration import restored, untrained
from lightning_qinit.insertion import QuantizedLayer, quantized_layers
from lightning_qinit.insertion.reads import Output, Reads
from lightning_qinit.plain import call

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class Folded(nn.Identity):
    """What stays of a BatchNorm that the layer before it does. Its one buffer says so in checkpoints."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("folded", torch.ones((), dtype=torch.int64, device=device))


@torch.no_grad()
def fold_batchnorm(module: nn.Module, sample: Any) -> dict[str, str]:
    """Make BatchNorm part of the weight and the bias of the convolution or Linear layer before it, in place.

    Before quantization-aware training, so that the folded weights are what is quantized and trained: call it on the
    trained float module, then :func:`~lightning_qinit.prepare` or ``Trainer.fit``. Or at the end, on what
    :func:`~lightning_qinit.export.fold` returns: its weights are then quantized values times a factor per channel.

    A pair is folded only if it is seen to be one: the module runs on the sample, in eval mode and without a trace, and
    no operator but the BatchNorm may read the output of the layer, nor may anything hold it afterwards. What the module
    does with other inputs, or in train mode only, is not seen. Outputs change by float rounding: factors are computed
    in float64 and rounded once.

    Parameters stay the objects they are; a layer without a bias gets one; an identity takes the place of the BatchNorm.
    Checkpoints say what was folded, and :func:`~lightning_qinit.load_from_checkpoint` and
    :func:`~lightning_qinit.restore` fold a fresh module alike.

    Args:
        module: a float module whose BatchNorm is trained, or a folded one.
        sample: what it is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        The BatchNorm layers that stay, by name, with the reason.

    Raises:
        ValueError: if the module has quantizers, or no BatchNorm can be folded. Nothing is changed then.
    """
    if any(layer.quantizers() for layer in quantized_layers(module).values()):
        raise ValueError(
            f"{type(module).__name__} has quantizers: call `fold_batchnorm` before they are inserted, or on "
            "`lightning_qinit.export.fold(module)`."
        )
    norms = {name: child for name, child in module.named_modules() if type(child) in NORMS}
    reads, kept = _run(module, sample, list(norms.values()))
    pairs: list[tuple[nn.Module, nn.Module]] = []
    stay: dict[str, str] = {}
    for name, norm in norms.items():
        found = _layer_before(module, norm, reads, kept)
        if isinstance(found, str):
            stay[name] = found
        else:
            pairs.append((found, norm))
    if not pairs:
        reasons = "; ".join(f"`{name}`: {reason}" for name, reason in list(stay.items())[:3]) or "it has none"
        raise ValueError(f"{type(module).__name__} has no BatchNorm that can be folded: {reasons}.")
    for layer, norm in pairs:
        _merge(layer, norm)
        _replace(module, norm)
    return stay


@torch.no_grad()
def fold_alike(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a module the layers of the one whose state this is, in place, without the numbers: no BatchNorm, a bias."""
    norms = [child for name, child in module.named_modules() if f"{name}.folded" in state and type(child) in NORMS]
    for norm in norms:
        _replace(module, norm)
    for name, layer in module.named_modules() if norms else ():
        if _kind(layer) in LAYERS and layer.bias is None and f"{name}.bias" in state:
            layer.bias = nn.Parameter(torch.zeros_like(state[f"{name}.bias"], device=layer.weight.device))


def _kind(layer: nn.Module) -> type[nn.Module]:
    return layer.float_class if isinstance(layer, QuantizedLayer) else type(layer)


def _run(module: nn.Module, sample: Any, norms: list[nn.Module]) -> tuple[Reads, list[Output]]:
    """Who reads what when the module runs, and the outputs that are still held then."""
    reads = Reads([*norms, *(child for child in module.modules() if _kind(child) in LAYERS)])
    with restored(module), reads.noting():
        result = call(module.eval(), sample)
        kept = [output for output in reads.outputs if output.tensor() is not None]
        del result
    return reads, kept


def _layer_before(module: nn.Module, norm: nn.Module, reads: Reads, kept: list[Output]) -> nn.Module | str:
    """The layer that a BatchNorm can be folded into, or why there is none."""
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    if untrained(norm):
        return "its statistics were never trained"
    if reads.calls[norm] != 1:
        return f"it runs {reads.calls[norm]} times"
    outputs = [output for output in reads.outputs if norm in output.readers and _kind(output.layer) in LAYERS]
    if len(outputs) != 1:
        return "it does not follow a convolution or Linear layer directly"
    (output,) = outputs
    layer: Any = output.layer
    name = next(name for name, child in module.named_modules() if child is layer)
    if output.readers != {norm} or output in kept:
        return f"the output of `{name}` is used elsewhere too"
    if reads.calls[layer] != 1:
        return f"`{name}` runs {reads.calls[layer]} times"
    if output.axes != layer.weight.dim():
        return f"it does not normalize the channels of `{name}`"
    if any(child._forward_hooks or child._forward_pre_hooks for child in (layer, norm)):
        return f"it or `{name}` has hooks"
    held = [(*child._parameters.values(), *child._buffers.values()) for child in module.modules()]
    holders = Counter(id(tensor) for tensors in held for tensor in tensors)
    statistics = norm.running_mean, norm.running_var, norm.num_batches_tracked
    for owner, tensors in ((layer, (layer.weight, layer.bias)), (norm, (norm.weight, norm.bias, *statistics))):
        for tensor in tensors:
            if tensor is not None and (holders[id(tensor)] > 1 or reads.readers[id(tensor)] - {owner}):
                return f"its parameters or statistics, or those of `{name}`, are used elsewhere too"
    return layer


def _merge(layer: Any, norm: Any) -> None:
    def double(tensor: Tensor | None, default: float) -> Tensor:
        filled = torch.full_like(norm.running_mean, default) if tensor is None else tensor
        return filled.detach().cpu().double()

    factor = double(norm.weight, 1) * (double(norm.running_var, 1) + norm.eps).rsqrt()
    bias = double(norm.bias, 0) + (double(layer.bias, 0) - double(norm.running_mean, 0)) * factor
    rows = factor[:, None]  # the first two axes of the weight
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups), the inputs of a group one after the other
        rows = factor.view(layer.groups, -1).repeat_interleave(layer.in_channels // layer.groups, 0)
    layer.weight.copy_(double(layer.weight, 0) * rows.view(*rows.shape, *[1] * (layer.weight.dim() - 2)))
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.empty_like(norm.running_mean, dtype=layer.weight.dtype))
        layer.bias.requires_grad_(layer.weight.requires_grad)
    layer.bias.copy_(bias)


def _replace(module: nn.Module, norm: Any) -> None:
    device = next((tensor.device for tensor in (*norm.parameters(), *norm.buffers())), None)
    folded = Folded(device).train(norm.training)
    for parent in module.modules():
        for name, child in list(parent._modules.items()):
            if child is norm:
                setattr(parent, name, folded)
