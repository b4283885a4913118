"""Layers that keep no quantized values for their backward pass: those are computed again from what is kept anyway."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_qinit.quantizers.straight_through import ThroughOutput

Operation = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def recomputed(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``operation(x, weight, bias)``, which keeps neither ``x`` nor ``weight`` for its backward pass if quantized.

    To differentiate, a layer keeps its input and its weight. A quantizer keeps what they were before, which in a float
    model is what the layer keeps. So here the layer notes only where they come from, and they are rounded once more, to
    the same bits, when its turn comes: a pass over the values instead of 4 bytes for each.

    Args:
        operation: linear in ``x`` and in ``weight``; keeps nothing but these two, or views of them.
        x: the input.
        weight: the weight.
        bias: added to the output.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # the compiler chooses what to keep by itself
        return operation(x, weight, bias)
    x, weight = _with_origin(x), _with_origin(weight)
    source: Any = x.grad_fn  # of the class that the function's name stands for, with its attributes
    of_data = hasattr(source, "rounding") and not source.needs_input_grad[0] and source.steps[0].numel() == 1
    origins = {t.untyped_storage().data_ptr(): t for t in (x, weight) if t.grad_fn is not None}

    def pack(kept: Tensor) -> Any:
        origin = origins.get(kept.untyped_storage().data_ptr())
        if origin is None:
            return kept.detach(), kept._version
        return origin.grad_fn, origin.stride(), (kept.shape, kept.stride(), kept.storage_offset())

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        out = operation(x.detach() if of_data else x, weight, bias)
    origins.clear()  # what is kept holds the function `pack`
    if of_data:
        out = ThroughOutput.apply(out, *source.steps, weight, source, lambda x, weight: operation(x, weight, None))
    return out


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed[0], Tensor):
        kept, version = packed
        if kept._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"an input of a quantized layer, of shape {tuple(kept.shape)}"
            )
        return kept
    node, stride, view = packed
    again = node.again(node)
    if again.stride() != stride:  # hooks around the layer may bring back what they kept in another order
        again = torch.empty_strided(again.shape, stride, dtype=again.dtype, device=again.device).copy_(again)
    return again.as_strided(*view)


def _with_origin(x: Tensor) -> Tensor:
    """A tensor whose ``grad_fn`` knows how to get it again, if it needs a gradient."""
    return _Kept.apply(x) if x.requires_grad and not hasattr(x.grad_fn, "again") else x


class _Kept(torch.autograd.Function):
    """The identity. It keeps its argument as any operation does: subject to hooks, and to the check for changes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.again = _kept
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _kept(node: Any) -> Tensor:
    (x,) = node.saved_tensors
    return x
