"""What every quantizer has: a step that trains, and the state that says how it was calibrated."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_qinit.checks import shorten
from lightning_qinit.functional.fake_quantize import EXTREME, broadcast_channels
from lightning_qinit.functional.levels import is_run
from lightning_qinit.functional.sharded import copy_whole, whole
from lightning_qinit.quantizers.chain import Levels
from lightning_qinit.quantizers.fused import Operand
from lightning_qinit.quantizers.kept import KeptWeight
from lightning_qinit.quantizers.kernels import Kernels, is_tracing
from lightning_qinit.quantizers.relative import of_offset, of_step, relative
from lightning_qinit.quantizers.rounding import Rounding, Units
from lightning_qinit.quantizers.straight_through import round_to_levels


class Quantizer(nn.Module, ABC):
    """Maps values to the nearest of ``scale * levels``, and trains the step.

    A quantizer is the identity until it is calibrated. Its state is plain tensors, so that checkpoints carry it:
    the parameter ``relative_step`` (the step in units of ``initial_step``, see
    :func:`~lightning_qinit.quantizers.relative.relative`) and the buffers ``initial_step``, ``calibrated``, ``signed``
    and ``bits``; with an offset also ``relative_offset`` (in units of the initial step, from the initial offset) and
    ``initial_offset``. All keep float32 whatever precision the module is cast to.

    ``watch``, if set, is called with the quantizer, values and quantized values whenever it quantizes; neither may be
    kept.

    A subclass names itself and states its levels::

        class Ternary(Quantizer, name="ternary"):
            def level_set(self, bits, signed):
                return torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)

    Its gradients are LSQ's, level by level: with ``v = x / s`` the gradient to ``x`` passes between the outer levels;
    the step receives ``level - v`` there and the outer level beyond. Override :meth:`gradient_scale` for another factor
    on the latter, and :meth:`quantize` for other gradients.

    Args:
        bits: 1 to 8.
        channels: number of steps: one, or one per channel.
        channel_axis: the axis of the values along which the channels run; ``None`` for one step.
        batch_axis: the axis that runs over samples; ``None`` for values that are not a batch (weights).
        device: where the state lives.
    """

    registry: ClassVar[dict[str, type["Quantizer"]]] = {}
    name: ClassVar[str]
    has_offset: bool = False
    """Whether the points are ``scale * levels + offset``, and the offset is learned."""
    learns_rounding: ClassVar[bool] = True
    """Whether the step receives ``level - v`` between the outer levels, or nothing."""

    relative_step: nn.Parameter
    relative_offset: nn.Parameter | None
    initial_step: Tensor
    initial_offset: Tensor | None
    calibrated: Tensor
    signed: Tensor
    bits: Tensor
    points: Tensor

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name or cls.__name__
        if name is not None:
            Quantizer.registry[name] = cls

    def __init__(
        self,
        bits: int,
        channels: int = 1,
        channel_axis: int | None = None,
        batch_axis: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.channel_axis, self.batch_axis = channel_axis, batch_axis
        self.enabled = True
        self.kernels: Kernels = "auto"
        self.kept = KeptWeight()
        self.watch: Callable[[Quantizer, Tensor, Tensor], None] | None = None
        self._first_bits = int(bits)
        self.relative_step = nn.Parameter(torch.empty(channels, dtype=torch.float32, device=device))
        self.register_parameter(
            "relative_offset", nn.Parameter(torch.empty_like(self.relative_step)) if self.has_offset else None
        )
        self.register_buffer("initial_step", torch.empty(channels, dtype=torch.float32, device=device))
        self.register_buffer("initial_offset", torch.empty_like(self.initial_step) if self.has_offset else None)
        # flags are integers, since callbacks that average weights subtract buffers, and bools cannot be subtracted
        self.register_buffer("calibrated", torch.empty(1, dtype=torch.int64, device=device))
        self.register_buffer("signed", torch.empty(1, dtype=torch.int64, device=device))
        self.register_buffer("bits", torch.empty(1, dtype=torch.int64, device=device))
        self.reset_parameters()
        # nn.TransformerEncoderLayer has a fused path in eval mode that never calls its Linear layers; it takes
        # the ordinary one where any submodule has a hook.
        self.register_forward_hook(ordinary_path)

    def reset_parameters(self) -> None:
        """Back to before calibration: step 1, offset 0, identity. Also how meta tensors are materialized."""
        with torch.no_grad():
            for offset in (self.relative_offset, self.initial_offset):
                if offset is not None:
                    offset.zero_()
            self.relative_step.fill_(1.0)
            self.initial_step.fill_(1.0)
            self.calibrated.fill_(False)
            self.signed.fill_(True)
            self.bits.fill_(self._first_bits)
        self._remember(False, True, self._first_bits)

    def _remember(self, calibrated: bool, signed: bool, bits: int) -> None:
        """Python twins of the buffers: forward must not read tensors, which would synchronize with the device."""
        self.is_calibrated, self.is_signed, self.n_bits = calibrated, signed, bits
        levels = self.level_set(bits, signed)
        self.low, self.high, self.positive = float(levels[0]), float(levels[-1]), int((levels > 0).sum())
        self.uniform = is_run(levels)
        points = levels[[0, -1]] if self.uniform else levels
        self.register_buffer("points", points.to(self.initial_step).contiguous(), persistent=False)
        self.kept.switch(self.kept.on)

    @abstractmethod
    def level_set(self, bits: int, signed: bool) -> Tensor:
        """The levels at step 1: sorted, 1-D, float64."""

    def gradient_scale(self, elements: int) -> float:
        """A factor on the gradients of step and offset.

        It makes the outermost point ``s c_max`` move as fast as the ``s Qp`` of LSQ does, ``Qp`` the number of positive
        levels: ``Qp^1.5 / (c_max^2 sqrt(N))``.

        Args:
            elements: ``N``, how many values share one step (per sample, for activations).
        """
        return max(1, self.positive) ** 1.5 / max(-self.low, self.high) ** 2 * elements**-0.5

    def quantize(self, x: Tensor, scale: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
        """Quantize values, with the method's gradients.

        Args:
            x: the values, in their own dtype.
            scale: the step in float32. It has as many axes as ``x``, so that ``x / scale`` is in float32 at least.
            elements: how many values of ``x`` share one step (per sample, for activations): the ``N`` of LSQ's
                gradient scale.
            dtype: of the result.
        """
        offset = self.offset
        if offset is not None:
            offset = broadcast_channels(offset, x, self.channel_axis)
        return round_to_levels(x, self._rounding(x, scale, offset, None, elements, dtype))

    def _rounding(
        self,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        units: Units | None,
        elements: int,
        dtype: torch.dtype,
    ) -> Rounding:
        points = self.points if x.dtype != torch.float64 or self.uniform else self.levels.to(x)
        # torch.compile(dynamic=True) has to meet a float before the step of autograd that reads it, and float() does so
        levels = Levels(points, float(self.low), float(self.high), self.uniform)
        constants = self.learns_rounding, self.gradient_scale(elements), dtype, self.kernels
        how = Rounding(scale, offset, levels, *constants, units)
        return self.kept.known(x, how, self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "watch": None}

    def transform(self, x: Tensor) -> Tensor:
        """What is done to the values before they are quantized: nothing, unless a subclass normalizes them."""
        return x

    @property
    def levels(self) -> Tensor:
        """The levels at step 1 in use: sorted, 1-D, float64."""
        return self.level_set(self.n_bits, self.is_signed)

    @property
    def step(self) -> Tensor:
        """The step in use, ``(channels,)``: within ``initial_step`` divided or times 2^16."""
        return relative(whole(self.relative_step), None, self.initial_step, of_step())

    @property
    def offset(self) -> Tensor | None:
        """The offset in use, ``(channels,)``: within 2^16 initial steps of where it started; ``None`` without one."""
        if self.relative_offset is None:
            return None
        return relative(whole(self.relative_offset), self.initial_offset, self.initial_step, of_offset())

    @property
    def active(self) -> bool:
        """Whether ``forward`` quantizes: calibrated, and not switched off by ``enabled = False``."""
        return self.enabled and self.is_calibrated

    def forward(self, x: Tensor, samples: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Quantize ``x``; identity until calibrated. Computes in float32 at least.

        Args:
            x: the values.
            samples: how many samples they are, for LSQ's gradient scale; ``None``: the size of the batch axis.
            dtype: of the result; ``None``: that of ``x``.
        """
        if not self.active or not x.is_floating_point():
            return x
        scale = broadcast_channels(self.step, x, self.channel_axis)
        y = self.quantize(self.transform(x), scale, self._elements_per_step(x, samples), dtype or x.dtype)
        if self.watch is not None:
            self._show(x.detach(), y.detach())
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _show(self, x: Tensor, y: Tensor) -> None:
        if self.watch is not None:
            self.watch(self, x, y)

    def operand(self, x: Tensor, dtype: torch.dtype | None = None) -> Operand | None:
        """What ``forward`` would round, and how, for an operation that does it; ``None`` if that is not all it does.

        Which is so for subclasses that quantize, or compute their step, in a way of their own, and where there are
        hooks.
        """
        for name in ("quantize", "forward", "step", "offset"):
            if name in self.__dict__ or getattr(type(self), name) is not getattr(Quantizer, name):
                return None
        if self._is_hooked:
            return None
        if not self.active or not x.is_floating_point():
            return Operand(x)
        values, offset = self.transform(x), self.relative_offset
        units = Units(self.initial_step, self.initial_offset, self.channel_axis)
        parameters = whole(self.relative_step), None if offset is None else whole(offset), units
        how = self._rounding(values, *parameters, self._elements_per_step(x, None), dtype or x.dtype)
        return Operand(values, how, self.watch and partial(self.watch, self, x.detach()))

    @property
    def _is_hooked(self) -> bool:
        before, after = len(self._forward_pre_hooks), len(self._forward_hooks)  # one is that of every quantizer
        return before + after + len(self._backward_pre_hooks) + len(self._backward_hooks) > 1

    def _elements_per_step(self, x: Tensor, samples: int | None) -> int:
        if is_tracing():  # of which no gradient is asked, and whose sizes are no numbers
            return 1
        if samples is None:  # values of fewer axes are a single sample
            axis = self.batch_axis
            samples = 1 if axis is None or x.dim() < axis + 2 else max(1, x.shape[axis])
        return max(1, x.numel() // (samples * self.initial_step.numel()))

    @torch.no_grad()
    def start(self, step: Tensor, bits: int, signed: bool, offset: Tensor | None = None) -> None:
        """Set the step from calibration: the quantizer is active from here on.

        Args:
            step: positive and finite, ``(channels,)`` or one for all.
            bits: 1 to 8.
            signed: whether the levels reach below zero.
            offset: as ``step``, for quantizers that learn one; ``None`` for 0.
        """
        if self.relative_offset is not None and self.initial_offset is not None:
            offset = torch.zeros_like(step) if offset is None else offset
            self.initial_offset.copy_(offset.to(self.initial_offset).expand_as(self.initial_offset))
            copy_whole(self.relative_offset, torch.zeros_like(self.initial_offset))
        step = step.to(self.initial_step).clamp(1 / EXTREME, EXTREME).expand_as(self.initial_step).contiguous()
        copy_whole(self.relative_step, torch.ones_like(step))
        self.initial_step.copy_(step)
        self.calibrated.fill_(True)
        self.signed.fill_(signed)
        self.bits.fill_(bits)
        self._remember(True, bool(signed), int(bits))

    @torch.no_grad()
    def _save_to_state_dict(self, *args: Any) -> None:
        # callbacks that average weights may average these as well, and an average of integers is cut down: 3 to 2
        twins = ((self.calibrated, self.is_calibrated), (self.signed, self.is_signed), (self.bits, self.n_bits))
        for buffer, value in twins:
            if not buffer.is_inference():
                buffer.fill_(value)
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return  # a checkpoint of the float module: nothing to load, nothing missing
        # not by `state_dict()`, which writes to buffers: what is loaded may lie in them, as after a distributed load
        held = {**self._parameters, **self._buffers}
        own = [name for name, t in held.items() if t is not None and name not in self._non_persistent_buffers_set]
        if missing := [name for name in own if prefix + name not in state_dict]:
            error_msgs.append(  # raised by torch, also where loading is not strict
                f"The quantizer {prefix[:-1]!r} has {shorten(missing)} missing in the state that is loaded, and would "
                f"stay in float: save all of {', '.join(own)}."
            )
            return
        errors = missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *errors)
        self._remember(bool(self.calibrated), bool(self.signed), int(self.bits))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantizer":
        # half precision would swallow a step's updates: follow device moves, refuse casts
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def extra_repr(self) -> str:
        sign = "signed" if self.is_signed else "unsigned"
        return f"{self.n_bits} bits, {sign}, steps={self.initial_step.numel()}, calibrated={self.is_calibrated}"


def ordinary_path(module: nn.Module, args: Any, output: Any) -> None:
    """Does nothing; that it is there keeps ``nn.TransformerEncoderLayer`` from bypassing the quantizers."""
