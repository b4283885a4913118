"""Rounding to the nearest level and its derivatives, each pass by a kernel or the chain of operations."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qinit.functional.fake_quantize import broadcast_channels
from lightning_qinit.quantizers.chain import Levels, backward, forward, tangents
from lightning_qinit.quantizers.kernels import KernelModule, Kernels, written_for
from lightning_qinit.quantizers.relative import gradient, of_offset, of_step, relative
from lightning_qinit.quantizers.scratch import Scratch

Gradients = tuple[Tensor, Tensor | None, Tensor | None]


class Units(NamedTuple):
    """What step and offset are measured in (see :mod:`~lightning_qinit.quantizers.relative`), ``(channels,)``.

    Attributes:
        step: the step at the start, which is the unit of both.
        offset: the offset at the start; ``None`` if there is none.
        axis: along which the channels run; ``None`` for one step.
    """

    step: Tensor
    offset: Tensor | None
    axis: int | None


class Rounding(NamedTuple):
    """How a tensor is rounded.

    Attributes:
        scale: the step, broadcasting against the values, with as many axes; with ``units``, what it is in those.
        offset: likewise; ``None`` for 0.
        levels: the levels at step 1.
        learns_rounding: whether the step receives ``level - v`` between the outer levels, or nothing (PACT).
        gradient_scale: a factor on the gradients of step and offset.
        dtype: of the result.
        kernels: whether to use compiled kernels (see :mod:`~lightning_qinit.quantizers.kernels`).
        units: those of step and offset, ``(channels,)`` then; ``None`` where they are what they are.
        ready: the result, if it is known.
        format: how the result is to lie in memory, where a kernel can have it so.
    """

    scale: Tensor
    offset: Tensor | None
    levels: Levels
    learns_rounding: bool
    gradient_scale: float
    dtype: torch.dtype
    kernels: Kernels
    units: Units | None = None
    ready: Tensor | None = None
    format: torch.memory_format = torch.preserve_format

    @property
    def axis(self) -> int | None:
        """Along which the channels run; ``None`` for one step."""
        if self.units is not None:
            return self.units.axis
        return next((axis for axis, size in enumerate(self.scale.shape) if size > 1), None)

    @property
    def read(self) -> tuple[Tensor | None, ...]:
        """What kernels read, in their order: the step, its unit, the offset, where that starts, and the levels."""
        unit, start = (None, None) if self.units is None else self.units[:2]
        return self.scale, unit, self.offset, start, self.levels.points

    def fits(self, x: Tensor) -> bool:
        """Whether kernels can read step, offset and levels: as float32 without gaps, beside the values; and whether
        there is one step for all or one per channel."""
        scale, units = self.scale, self.units
        *steps, points = [t for t in self.read if t is not None]
        if any(t.device != x.device or t.dtype != torch.float32 or not t.is_contiguous() for t in (points, *steps)):
            return False
        if any(t.shape != scale.shape for t in steps):
            return False
        if units is not None and (units.offset is None) != (self.offset is None):
            return False
        channels = scale.numel()
        if channels == 1:
            return True
        if units is None and scale.dim() != x.dim():
            return False
        axis = self.axis
        return axis is not None and axis < x.dim() and x.shape[axis] == channels

    def without_units(self, x: Tensor) -> "Rounding":
        """The same, with step and offset as they broadcast against the values."""
        if self.units is None:
            return self
        unit, start, axis = self.units
        scale, offset = relative(self.scale, None, unit, of_step()), self.offset
        if offset is not None:
            offset = broadcast_channels(relative(offset, start, unit, of_offset()), x, axis)
        return self._replace(scale=broadcast_channels(scale, x, axis), offset=offset, units=None)


def _kernels(x: Tensor, how: Rounding, dtype: torch.dtype) -> KernelModule | None:
    """Those for the values, if step, offset and levels fit: kernels do as they are told, where operations check."""
    kernels = written_for(x, dtype, how.kernels)
    return kernels if kernels is not None and how.fits(x) else None


def rounded(x: Tensor, how: Rounding, scratch: Scratch | None = None) -> Tensor:
    """The values on their levels, without gradients.

    Args:
        x: the values.
        how: the rounding.
        scratch: where the result may lie; valid until it is asked for memory again.
    """
    if how.ready is not None:
        return how.ready.detach()
    if kernels := _kernels(x, how, how.dtype):
        return kernels.rounded(x, how, scratch)
    how = how.without_units(x)
    return forward(x, how.scale, how.offset, how.levels, how.dtype)


def gradients(grad: Tensor, x: Tensor, how: Rounding, private: bool = False) -> Gradients:
    """The gradients to ``x``, step and offset.

    The gradient to ``x`` passes where ``v = (x - offset) / scale`` lies between the outer levels. The step receives,
    times the gradient scale, the outer level where ``v`` lies on it or beyond, and ``level - v`` between (LSQ, equation
    3); the offset 1 where ``v`` lies on the outer levels or beyond (LSQ+, section 3.1).

    Args:
        grad: the gradient to the result.
        x: the values.
        how: the rounding.
        private: whether ``grad`` is seen by nobody else, so that the gradient to ``x`` may be written over it.
    """
    if (kernels := _kernels(x, how, grad.dtype)) and not grad.is_neg():
        return kernels.gradients(grad, x, how, private)
    plain = how.without_units(x)
    to_x, to_scale, to_offset = backward(grad, x, plain.scale, plain.offset, how.levels, how.learns_rounding)
    return to_x, *scaled(how, to_scale, to_offset)


def rounded_with_gradients(grad: Tensor, x: Tensor, how: Rounding, scratch: Scratch) -> tuple[Tensor, Gradients]:
    """The result of :func:`rounded` and, of a ``grad`` that is seen by nobody else, that of :func:`gradients`."""
    if grad.dtype == how.dtype and (kernels := _kernels(x, how, how.dtype)):
        return kernels.rounded_with_gradients(grad, x, how, scratch)
    return rounded(x, how, scratch), gradients(grad, x, how, private=True)


def scaled(how: Rounding, to_scale: Tensor, to_offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients to step and offset as they are given, from those to what they are, without the gradient scale."""
    to_scale = to_scale.reshape(how.scale.shape) * how.gradient_scale
    if to_offset is not None:
        to_offset = to_offset.reshape(how.scale.shape) * how.gradient_scale
    if how.units is not None:
        unit = how.units.step
        to_scale = gradient(to_scale, how.scale, unit, of_step())
        if to_offset is not None and how.offset is not None:
            to_offset = gradient(to_offset, how.offset, unit, of_offset())
    return to_scale, to_offset


def changes(x: Tensor, how: Rounding) -> tuple[Tensor, Tensor | None]:
    """How each rounded value changes with the step, and with the offset, in the dtype of the result."""
    if kernels := _kernels(x, how, how.dtype):
        return kernels.changes(x, how)
    how = how.without_units(x)
    return tangents(x, how.scale, how.offset, how.levels, how.learns_rounding, how.dtype)
