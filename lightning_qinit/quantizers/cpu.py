"""The passes of a quantizer on a CPU, each a loop in C++ (in ``cpp``).

What ``torch.compile`` would make of a pass is as fast, but to call it takes longer than many a pass: its guards are
checked at every one of the hundred passes of a training step. Here the call takes two microseconds, from step and
offset as they are stored to the gradients to those.
"""

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_qinit.quantizers.kernels import DTYPES
from lightning_qinit.quantizers.relative import MAX_DRIFT
from lightning_qinit.quantizers.scratch import Scratch

if TYPE_CHECKING:
    from lightning_qinit.quantizers.rounding import Gradients, Rounding

ADDRESS, SIZE, COUNT, FLAG, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_bool, ctypes.c_float
SOURCES = "numbers.h", "blocks.h", "passes.cpp"
# x, scale, unit, offset, start, levels; how values lie, threads, the number of levels, whether they are uniform
PARAMETERS = *6 * [ADDRESS], *5 * [SIZE], COUNT, COUNT, FLAG
FUNCTIONS = {
    "forward": (ADDRESS, *PARAMETERS),
    "backward": (*5 * [ADDRESS], *PARAMETERS, FLAG, NUMBER),
    "tangents": (*2 * [ADDRESS], *PARAMETERS, FLAG),
    "across": (*2 * [ADDRESS], *3 * [SIZE], COUNT),
}


def check(device: torch.device) -> None:
    """Raise whatever keeps these kernels from running on a device."""
    _library(torch.float32, torch.float32)


def rounded(x: Tensor, how: "Rounding", scratch: Scratch | None) -> Tensor:
    """As :func:`~lightning_qinit.quantizers.rounding.rounded`."""
    x = _without_gaps(x)
    out = _room(x, how, scratch)
    _call(_library(x.dtype, how.dtype).forward, x, how, out)
    return out


def gradients(grad: Tensor, x: Tensor, how: "Rounding", private: bool) -> "Gradients":
    """As :func:`~lightning_qinit.quantizers.rounding.gradients`."""
    return _backward(grad, _without_gaps(x), how, private, None)


def rounded_with_gradients(grad: Tensor, x: Tensor, how: "Rounding", scratch: Scratch) -> tuple[Tensor, "Gradients"]:
    """As :func:`~lightning_qinit.quantizers.rounding.rounded_with_gradients`, in one pass."""
    x = _without_gaps(x)
    out = _room(x, how, scratch)
    return out, _backward(grad, x, how, True, out)


def _backward(grad: Tensor, x: Tensor, how: "Rounding", private: bool, out: Tensor | None) -> "Gradients":
    beside = out if out is not None else grad if _lies_across(grad, x, how) else x
    if not _lies_alike(grad, beside):
        grad, private = torch.empty_like(beside, dtype=grad.dtype).copy_(grad), True
    to_x = grad if private and grad.dtype == x.dtype and _lies_alike(grad, x) else torch.empty_like(x)
    to_scale = torch.empty_like(how.scale, dtype=torch.float32)
    to_offset = None if how.offset is None else torch.empty_like(how.offset, dtype=torch.float32)
    function, constants = _library(x.dtype, grad.dtype).backward, (how.learns_rounding, how.gradient_scale)
    _call(function, x, how, grad, to_x, to_scale, to_offset, out, constants=constants)
    return to_x, to_scale, to_offset


def changes(x: Tensor, how: "Rounding") -> tuple[Tensor, Tensor | None]:
    """As :func:`~lightning_qinit.quantizers.rounding.changes`."""
    x = _without_gaps(x)
    by_scale = _room(x, how, None)
    by_offset = None if how.offset is None else torch.empty_like(by_scale)
    _call(_library(x.dtype, how.dtype).tangents, x, how, by_scale, by_offset, constants=(how.learns_rounding,))
    return by_scale, by_offset


def _without_gaps(x: Tensor) -> Tensor:
    """The values, copied if there are gaps between them in memory; the order of axes is left alone."""
    if x.is_contiguous() or x.permute(sorted(range(x.dim()), key=lambda axis: -x.stride()[axis])).is_contiguous():
        return x
    return torch.empty_like(x).copy_(x)


def laid_out(x: Tensor, to: torch.memory_format, scratch: Scratch | None) -> Tensor:
    """As :func:`~lightning_qinit.quantizers.formats.laid_out`, of images in the other of both formats."""
    out = torch.empty_like(x, memory_format=to) if scratch is None else scratch.empty(x, x.dtype, to)
    image = x.shape[1], x.shape[2] * x.shape[3]
    lie = image if to == torch.channels_last else image[::-1]
    _library(x.dtype, x.dtype).across(out.data_ptr(), x.data_ptr(), len(x), *lie, torch.get_num_threads())
    return out


def _room(x: Tensor, how: "Rounding", scratch: Scratch | None) -> Tensor:
    """Memory for the result."""
    format = how.format if _can_lie_across(x, how) else torch.preserve_format
    if scratch is None:
        return torch.empty_like(x, dtype=how.dtype, memory_format=format)
    return scratch.empty(x, how.dtype, format)


def _can_lie_across(x: Tensor, how: "Rounding") -> bool:
    """Whether the channels of results can be the last in memory where those of the values are not: if they share a
    step."""
    shared = how.scale.numel() == 1 or how.axis == 0
    return x.dim() == 4 and shared and x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)


def _lies_across(y: Tensor, x: Tensor, how: "Rounding") -> bool:
    return _can_lie_across(x, how) and y.is_contiguous(memory_format=torch.channels_last)


def _lies_alike(y: Tensor, x: Tensor) -> bool:
    strides = zip(y.stride(), x.stride(), x.shape, strict=True)
    return y.stride() == x.stride() or all(of_y == of_x for of_y, of_x, size in strides if size > 1)


def _call(
    function: Any, x: Tensor, how: "Rounding", y: Tensor, *others: Tensor | None, constants: tuple[Any, ...] = ()
) -> None:
    """Call a function, of which ``y`` is on the other side of the rounding: it lies as ``x`` does, or across."""
    levels, channels, axis = how.levels, how.scale.numel(), how.axis
    inner = x.numel() if channels == 1 or axis is None else x.stride(axis)
    addresses = [None if t is None else t.data_ptr() for t in (y, *others, x, *how.read)]
    image = (0, 0) if _lies_alike(y, x) else (x.shape[1], x.shape[2] * x.shape[3])
    lie = x.numel() // (channels * inner), channels, inner, *image
    function(*addresses, *lie, torch.get_num_threads(), levels.points.shape[0], levels.uniform, *constants)


@functools.cache
def _library(values: torch.dtype, results: torch.dtype) -> ctypes.CDLL:
    """The functions for two dtypes, compiled if they have never been on this machine."""
    # torch.compile's own way to compile: it knows which compiler and which flags, and keeps the result on disk
    from torch._inductor.codecache import CppCodeCache

    defined = {"IN": DTYPES[values], "OUT": DTYPES[results], "DRIFT": f"{MAX_DRIFT}.0f"}
    parts = [f"#define {name} {value}\n" for name, value in defined.items()]
    parts += [(Path(__file__).parent / "cpp" / name).read_text() for name in SOURCES]
    library: ctypes.CDLL = CppCodeCache.load("".join(parts))
    for name, types in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library
