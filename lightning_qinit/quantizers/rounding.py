"""Rounding to the nearest level and its derivatives, each pass by a compiled kernel or the chain of operations."""

from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_qinit.functional.fake_quantize import broadcast_channels
from lightning_qinit.quantizers.kernels import (
    BACKWARD,
    BACKWARD_OVER,
    FORWARD,
    TANGENTS,
    Kernels,
    are_compiled,
    backward,
    forward,
    tangents,
    written_for,
)
from lightning_qinit.quantizers.layout import Layout
from lightning_qinit.quantizers.relative import OF_OFFSET, OF_STEP, gradient, relative
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
        points: the levels at step 1, 1-D and sorted; the lowest and the highest of them if they are uniform.
        uniform: whether the levels are all integers between two.
        learns_rounding: whether the step receives ``level - v`` between the outer levels, or nothing (PACT).
        gradient_scale: a factor on the gradients of step and offset.
        dtype: of the result.
        kernels: whether to use compiled kernels (see :mod:`~lightning_qinit.quantizers.kernels`).
        units: those of step and offset, ``(channels,)`` then; ``None`` where they are what they are.
        known: step and offset as they broadcast against the values, if they were found before.
        ready: the result, if it is known.
    """

    scale: Tensor
    offset: Tensor | None
    points: Tensor
    uniform: bool
    learns_rounding: bool
    gradient_scale: float
    dtype: torch.dtype
    kernels: Kernels
    units: Units | None = None
    known: tuple[Tensor, Tensor | None] | None = None
    ready: Tensor | None = None

    def without_units(self, x: Tensor) -> "Rounding":
        """The same, with step and offset as they broadcast against the values."""
        if self.units is None:
            return self
        if self.known is not None and not torch.is_grad_enabled():
            scale, offset = self.known
            return self._replace(scale=scale, offset=offset, units=None)
        unit, start, axis = self.units
        scale, offset = relative(self.scale, None, unit, OF_STEP), self.offset
        if offset is not None:
            offset = broadcast_channels(relative(offset, start, unit, OF_OFFSET), x, axis)
        return self._replace(scale=broadcast_channels(scale, x, axis), offset=offset, units=None)

    def prepared(self, x: Tensor) -> "Rounding":
        """The same for several passes over the values: what the units make of step and offset is found once."""
        if self.units is None or written_for(x, self.kernels):  # those kernels find it as they go
            return self
        plain = self.without_units(x)
        return self._replace(known=(plain.scale, plain.offset))

    @property
    def columns(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Step, offset and levels as kernels take them."""
        offset = None if self.offset is None else self.offset.detach().reshape(-1, 1)
        return self.scale.detach().reshape(-1, 1), offset, self.points


def rounded(x: Tensor, how: Rounding, scratch: Scratch | None = None) -> Tensor:
    """The values on their levels, without gradients.

    Args:
        x: the values.
        how: the rounding.
        scratch: where the result may lie; valid until it is asked for memory again.
    """
    if how.ready is not None:
        return how.ready.detach()
    compiled = are_compiled(x, how.kernels)
    if compiled and (gpu := written_for(x, how.kernels)):
        return cast(Tensor, gpu.rounded(x, how))
    how = how.without_units(x)
    if not compiled:
        return forward(x, how.scale, how.offset, how.points, how.uniform, how.dtype)
    layout = Layout(x, how.scale)
    room = layout.empty if scratch is None else partial(scratch.empty, layout)
    out = room(how.dtype, x.device)
    FORWARD(layout.flat(out), layout.flat(x), *how.columns, how.uniform, how.dtype, force=how.kernels == "compiled")
    return out


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
    compiled = are_compiled(x, how.kernels)
    if compiled and (gpu := written_for(x, how.kernels)):
        return cast(Gradients, gpu.gradients(grad, x, how, private))
    given, how = how, how.without_units(x)
    constants = how.uniform, how.learns_rounding
    if not compiled:
        to_x, to_scale, to_offset = backward(grad, x, how.scale, how.offset, how.points, *constants)
    else:
        layout, force = Layout(x, how.scale), how.kernels == "compiled"
        values = layout.flat(grad)
        its_own = values.data_ptr() == grad.data_ptr()  # not a copy in another order
        if private and its_own and grad.dtype == x.dtype and grad.stride() == x.stride():
            to_x = grad
            to_scale, to_offset = BACKWARD_OVER(values, layout.flat(x), *how.columns, *constants, force=force)
        else:
            to_x = layout.empty(x.dtype, x.device)
            to_scale, to_offset = BACKWARD(
                layout.flat(to_x), values, layout.flat(x), *how.columns, *constants, force=force
            )
    return to_x, *scaled(given, to_scale, to_offset)


def scaled(how: Rounding, to_scale: Tensor, to_offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients to step and offset as they are given, from those to what they are, without the gradient scale."""
    to_scale = to_scale.reshape(how.scale.shape) * how.gradient_scale
    if to_offset is not None:
        to_offset = to_offset.reshape(how.scale.shape) * how.gradient_scale
    if how.units is not None:
        unit = how.units.step
        to_scale = gradient(to_scale, how.scale, unit, OF_STEP)
        if to_offset is not None and how.offset is not None:
            to_offset = gradient(to_offset, how.offset, unit, OF_OFFSET)
    return to_scale, to_offset


def changes(x: Tensor, how: Rounding) -> tuple[Tensor, Tensor | None]:
    """How each rounded value changes with the step, and with the offset, in the dtype of the result."""
    compiled = are_compiled(x, how.kernels)
    if compiled and (gpu := written_for(x, how.kernels)):
        return cast(tuple[Tensor, Tensor | None], gpu.changes(x, how))
    how = how.without_units(x)
    constants = how.uniform, how.learns_rounding, how.dtype
    if not compiled:
        return tangents(x, how.scale, how.offset, how.points, *constants)
    layout = Layout(x, how.scale)
    by_scale, by_offset = TANGENTS(layout.flat(x), *how.columns, *constants, force=how.kernels == "compiled")
    return layout.restored(by_scale), None if by_offset is None else layout.restored(by_offset)
