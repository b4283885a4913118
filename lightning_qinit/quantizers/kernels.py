"""The two passes of a quantizer over its values, each compiled to one kernel where torch can.

As a chain of torch operations a pass reads and writes the values a dozen times, which is all that fake quantization
costs. ``torch.compile`` fuses it to one pass. Values are brought to two axes first, ``(channels, values)`` in the order
in which they lie in memory, and shapes are dynamic, so that one kernel serves every layer of a kind. On a GPU the
kernels are written out, in :mod:`~lightning_qinit.quantizers.gpu`.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.jit import is_tracing as is_tracing  # type: ignore[attr-defined]  # public, but not listed

from lightning_qinit.checks import check

log = logging.getLogger(__name__)

Kernels = Literal["auto", "compiled", "eager"]
LEAST = 2**15  # values from which a compiled kernel is faster than the chain on a CPU, its call included
UNROLLED = 32  # levels up to which comparing with every threshold is faster than searching among them


def check_kernels(kernels: Kernels) -> Kernels:
    """The setting, or ``ValueError`` if it is none."""
    check("kernels", kernels, kernels in get_args(Kernels), "'auto', 'compiled' or 'eager'")
    return kernels


def forward(
    x: Tensor, scale: Tensor, offset: Tensor | None, points: Tensor, uniform: bool, dtype: torch.dtype
) -> Tensor:
    """The point ``scale * level + offset`` nearest to each value.

    Args:
        x: the values.
        scale: the step, broadcasting against ``x``.
        offset: likewise; ``None`` for 0.
        points: the levels at step 1, or the lowest and the highest if ``uniform``.
        uniform: whether the levels are all integers between two.
        dtype: of the result.
    """
    v, scale, offset = _normalized(x, scale, offset)
    y = nearest(v, points, uniform) * scale
    return cast(y if offset is None else y + offset, dtype)


def forward_into(out: Tensor, *arguments: Any) -> None:
    """:func:`forward`, written to a tensor that there is."""
    out.copy_(forward(*arguments))


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    points: Tensor,
    uniform: bool,
    learns_rounding: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients to ``x``, ``scale`` and ``offset``, given that to the result of :func:`forward`."""
    v, scale, offset = _normalized(x, scale, offset)
    wide = cast(grad, v.dtype)
    inside, slope = _slope(v, points, uniform, learns_rounding)
    to_scale = _summed(wide * slope, scale)
    to_offset = None if offset is None else _summed(torch.where(inside, 0.0, wide), offset)
    return cast(torch.where(inside, grad, 0.0), x.dtype), to_scale, to_offset


def backward_into(out: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`backward`, the gradient to ``x`` written to a tensor that there is; returns the others."""
    to_x, to_scale, to_offset = backward(*arguments)
    out.copy_(to_x)
    return to_scale, to_offset


def backward_over(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`backward`, the gradient to ``x`` written over that to the result; returns the others."""
    to_x, to_scale, to_offset = backward(grad, *arguments)
    grad.copy_(to_x)
    return to_scale, to_offset


def tangents(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    points: Tensor,
    uniform: bool,
    learns_rounding: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """How each result of :func:`forward` changes with the scale, and with the offset."""
    v, scale, offset = _normalized(x, scale, offset)
    inside, slope = _slope(v, points, uniform, learns_rounding)
    return cast(slope, dtype), None if offset is None else (~inside).to(dtype)


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """The sum over the axes along which the other tensor has one value."""
    if torch.compiler.is_compiling() and x.dim() > 3 and like.numel() == 1:
        # The compiler's sum over everything walks through memory in the order of the axes, an order of magnitude slower
        # where the channels lie last; over the channels first it reads either layout as it lies.
        x = x.sum(1, keepdim=True)
    return x.sum_to_size(like.shape)


def _slope(v: Tensor, points: Tensor, uniform: bool, learns_rounding: bool) -> tuple[Tensor, Tensor]:
    """Which normalized values lie between the outer levels, and the derivative by the scale, given straight through."""
    inside = (v > points[0]) & (v < points[-1])
    level = nearest(v, points, uniform)
    return inside, level - torch.where(inside, v, 0.0) if learns_rounding else torch.where(inside, 0.0, level)


def _normalized(x: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values in units of the step, from the offset, in float32 at least; and scale and offset in that dtype.

    They are multiplied with ``1 / scale``, as in torch's own fake quantization: the codes are the same to the last bit.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, x = cast(scale, wide), cast(x, wide)
    if offset is not None:
        offset = cast(offset, wide)
        x = x - offset
    return x * scale.reciprocal(), scale, offset


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in another dtype.

    Where there is nothing to cast, to call ``Tensor.to`` in a step of autograd makes ``torch.compile`` of torch 2.11
    return the input as one of its results, whose gradients then are 0.
    """
    return x if x.dtype == dtype else x.to(dtype)


def nearest(v: Tensor, points: Tensor, uniform: bool) -> Tensor:
    """The level nearest to each normalized value; NaN stays NaN. Arguments as of :func:`forward`."""
    points = cast(points, v.dtype)
    if uniform:
        return torch.minimum(torch.maximum(v, points[0]), points[1]).round()
    thresholds = (points[1:] + points[:-1]) / 2
    if torch.compiler.is_compiling() and len(points) <= UNROLLED:
        level = points[0].expand_as(v)
        for k in range(len(points) - 1):
            level = torch.where(v >= thresholds[k], points[k + 1], level)
    else:
        level = torch.empty_like(v)  # keeps the memory format, which the lookup does not
        level.copy_(points[torch.bucketize(v.contiguous(), thresholds, right=True)])
    return torch.where(v == v, level, v)


class Kernel:
    """A pass over ``(channels, values)``, compiled when it is first called.

    Every kind of call (devices, dtypes, number of levels, constants) has a compiled function of its own, since torch
    counts recompilations per function and gives up after a few.
    """

    def __init__(self, chain: Callable[..., Any]) -> None:
        self.chain = chain
        self.compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any, force: bool) -> Any:
        """Call the compiled function; where it cannot be had, the chain, or with ``force`` raise ``RuntimeError``."""
        kind = tuple(_kind(a) if isinstance(a, Tensor) else a for a in arguments)
        if kind in self.compiled:
            return self.compiled[kind](*arguments)
        twin = FunctionType(self.chain.__code__.replace(), self.chain.__globals__)
        compiled = torch.compile(twin, dynamic=True)
        try:
            result = compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, or one that fails; what else may be wrong shows in the chain
            if force:
                raise RuntimeError(
                    f"`kernels` = 'compiled', but torch.compile fails here; 'auto' and 'eager' do without. ({error})"
                ) from error
            log.info("Quantizers do without torch.compile, which fails here: %s", error)
            compiled = self.chain
            result = compiled(*arguments)
        self.compiled[kind] = compiled
        return result


def _kind(x: Tensor) -> Any:
    return x.device.type, x.dtype, x.is_inference(), len(x) if x.dim() == 1 else None


def is_recorded() -> bool:
    """Whether torch records operations: in ``torch.compile``, exports and ``torch.jit.trace``."""
    return torch.compiler.is_compiling() or is_tracing()


def are_compiled(x: Tensor, kernels: Kernels) -> bool:
    """Whether the passes over these values are to be compiled kernels.

    Not where torch traces or differentiates the operations themselves: inside ``torch.compile`` and exports, which
    fuse them on their own, and in double backward.
    """
    if kernels == "eager" or is_recorded() or torch.is_grad_enabled():
        return False
    if type(x) not in (Tensor, nn.Parameter) or x.device.type == "meta" or x.numel() == 0:
        return False
    return kernels == "compiled" or x.is_cuda or (x.numel() >= LEAST and x.device.type == "cpu")


def written_for(x: Tensor, kernels: Kernels) -> ModuleType | None:
    """:mod:`~lightning_qinit.quantizers.gpu`, where its kernels run on these values; they compute in float32."""
    if not x.is_cuda or x.dtype == torch.float64:
        return None
    found = _written(x.device)
    if isinstance(found, ModuleType):
        return found
    if kernels == "compiled":
        raise RuntimeError(
            f"`kernels` = 'compiled', but Triton fails here; 'auto' and 'eager' do without. ({found})"
        ) from found
    return None


@functools.cache
def _written(device: torch.device) -> ModuleType | Exception:
    """The kernels for a device, or why they cannot be had: no Triton, no compiler, a device too old."""
    try:
        gpu = importlib.import_module("lightning_qinit.quantizers.gpu")
        gpu.check(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, the chain of operations computes the same
        log.info("Quantizers do without Triton, which fails here: %s", error)
        return error
    return gpu


FORWARD, BACKWARD, TANGENTS = Kernel(forward_into), Kernel(backward_into), Kernel(tangents)
BACKWARD_OVER = Kernel(backward_over)
