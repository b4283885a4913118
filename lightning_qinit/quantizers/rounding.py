"""Rounding to the nearest level and its derivatives, each pass by a compiled kernel or the chain of operations."""

from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

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
from lightning_qinit.quantizers.scratch import Scratch

Gradients = tuple[Tensor, Tensor | None, Tensor | None]


class Rounding(NamedTuple):
    """How a tensor is rounded.

    Attributes:
        scale: the step, broadcasting against the values, with as many axes.
        offset: likewise; ``None`` for 0.
        points: the levels at step 1, 1-D and sorted; the lowest and the highest of them if they are uniform.
        uniform: whether the levels are all integers between two.
        learns_rounding: whether the step receives ``level - v`` between the outer levels, or nothing (PACT).
        gradient_scale: a factor on the gradients of step and offset.
        dtype: of the result.
        kernels: whether to use compiled kernels (see :mod:`~lightning_qinit.quantizers.kernels`).
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
    ready: Tensor | None = None

    @property
    def constants(self) -> "Rounding":
        """All but step and offset, which autograd keeps."""
        return self._replace(scale=None, offset=None)  # type: ignore[arg-type]

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
    if not are_compiled(x, how.kernels):
        return forward(x, how.scale, how.offset, how.points, how.uniform, how.dtype)
    if gpu := written_for(x, how.kernels):
        return cast(Tensor, gpu.rounded(x, how))
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
    constants = how.uniform, how.learns_rounding
    if not are_compiled(x, how.kernels):
        to_x, *others = backward(grad, x, how.scale, how.offset, how.points, *constants)
    elif gpu := written_for(x, how.kernels):
        return cast(Gradients, gpu.gradients(grad, x, how, private))
    else:
        layout, force = Layout(x, how.scale), how.kernels == "compiled"
        values = layout.flat(grad)
        its_own = values.data_ptr() == grad.data_ptr()  # not a copy in another order
        if private and its_own and grad.dtype == x.dtype and grad.stride() == x.stride():
            to_x = grad
            others = BACKWARD_OVER(values, layout.flat(x), *how.columns, *constants, force=force)
        else:
            to_x = layout.empty(x.dtype, x.device)
            others = BACKWARD(layout.flat(to_x), values, layout.flat(x), *how.columns, *constants, force=force)
    shape, factor = how.scale.shape, how.gradient_scale
    to_scale, to_offset = (None if sum_ is None else sum_.reshape(shape) * factor for sum_ in others)
    return to_x, to_scale, to_offset


def changes(x: Tensor, how: Rounding) -> tuple[Tensor, Tensor | None]:
    """How each rounded value changes with the step, and with the offset, in the dtype of the result."""
    constants = how.uniform, how.learns_rounding, how.dtype
    if not are_compiled(x, how.kernels):
        return tangents(x, how.scale, how.offset, how.points, *constants)
    if gpu := written_for(x, how.kernels):
        return cast(tuple[Tensor, Tensor | None], gpu.changes(x, how))
    layout = Layout(x, how.scale)
    by_scale, by_offset = TANGENTS(layout.flat(x), *how.columns, *constants, force=how.kernels == "compiled")
    return layout.restored(by_scale), None if by_offset is None else layout.restored(by_offset)
