"""The passes of a quantizer on a CPU, each a loop in C++ (``cpu.cpp``).

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
# x, scale, unit, offset, start, levels; how values lie, threads, the number of levels, whether they are uniform
PARAMETERS = *6 * [ADDRESS], *3 * [SIZE], COUNT, COUNT, FLAG
FUNCTIONS = {
    "forward": (ADDRESS, *PARAMETERS),
    "backward": (*5 * [ADDRESS], *PARAMETERS, FLAG, NUMBER),
    "tangents": (*2 * [ADDRESS], *PARAMETERS, FLAG),
}


def check(device: torch.device) -> None:
    """Raise whatever keeps these kernels from running on a device."""
    _library(torch.float32, torch.float32)


def rounded(x: Tensor, how: "Rounding", scratch: Scratch | None) -> Tensor:
    """As :func:`~lightning_qinit.quantizers.rounding.rounded`."""
    x = _without_gaps(x)
    out = torch.empty_like(x, dtype=how.dtype) if scratch is None else scratch.empty(x, how.dtype)
    _call(_library(x.dtype, how.dtype).forward, (out,), x, how)
    return out


def gradients(grad: Tensor, x: Tensor, how: "Rounding", private: bool) -> "Gradients":
    """As :func:`~lightning_qinit.quantizers.rounding.gradients`."""
    return _backward(grad, _without_gaps(x), how, private, None)


def rounded_with_gradients(grad: Tensor, x: Tensor, how: "Rounding", scratch: Scratch) -> tuple[Tensor, "Gradients"]:
    """As :func:`~lightning_qinit.quantizers.rounding.rounded_with_gradients`, in one pass."""
    x = _without_gaps(x)
    out = scratch.empty(x, how.dtype)
    return out, _backward(grad, x, how, True, out)


def _backward(grad: Tensor, x: Tensor, how: "Rounding", private: bool, out: Tensor | None) -> "Gradients":
    if grad.stride() != x.stride():
        grad, private = torch.empty_like(x, dtype=grad.dtype).copy_(grad), True
    to_x = grad if private and grad.dtype == x.dtype else torch.empty_like(x)
    to_scale = torch.empty_like(how.scale, dtype=torch.float32)
    to_offset = None if how.offset is None else torch.empty_like(how.offset, dtype=torch.float32)
    results = to_x, grad, to_scale, to_offset, out
    _call(_library(x.dtype, grad.dtype).backward, results, x, how, how.learns_rounding, how.gradient_scale)
    return to_x, to_scale, to_offset


def changes(x: Tensor, how: "Rounding") -> tuple[Tensor, Tensor | None]:
    """As :func:`~lightning_qinit.quantizers.rounding.changes`."""
    x = _without_gaps(x)
    by_scale = torch.empty_like(x, dtype=how.dtype)
    by_offset = None if how.offset is None else torch.empty_like(by_scale)
    _call(_library(x.dtype, how.dtype).tangents, (by_scale, by_offset), x, how, how.learns_rounding)
    return by_scale, by_offset


def _without_gaps(x: Tensor) -> Tensor:
    """The values, copied if there are gaps between them in memory; the order of axes is left alone."""
    if x.is_contiguous() or x.permute(sorted(range(x.dim()), key=lambda axis: -x.stride()[axis])).is_contiguous():
        return x
    return x.contiguous()


def _call(function: Any, results: tuple[Tensor | None, ...], x: Tensor, how: "Rounding", *constants: Any) -> None:
    levels, channels, axis = how.levels, how.scale.numel(), how.axis
    inner = x.numel() if channels == 1 or axis is None else x.stride(axis)
    addresses = [None if t is None else t.data_ptr() for t in (*results, x, *how.read)]
    lie = x.numel() // (channels * inner), channels, inner
    function(*addresses, *lie, torch.get_num_threads(), levels.points.shape[0], levels.uniform, *constants)


@functools.cache
def _library(values: torch.dtype, results: torch.dtype) -> ctypes.CDLL:
    """The functions for two dtypes, compiled if they have never been on this machine."""
    # torch.compile's own way to compile: it knows which compiler and which flags, and keeps the result on disk
    from torch._inductor.codecache import CppCodeCache

    defined = {"IN": DTYPES[values], "OUT": DTYPES[results], "DRIFT": f"{MAX_DRIFT}.0f"}
    source = "".join(f"#define {name} {value}\n" for name, value in defined.items())
    library: ctypes.CDLL = CppCodeCache.load(source + Path(__file__).with_name("cpu.cpp").read_text())
    for name, types in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library
