"""An input quantizer that has learned: numbers and torch operators, no parameters and no state."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qinit.quantizers.base import Quantizer, ordinary_path
from lightning_qinit.quantizers.chain import Levels, forward
from lightning_qinit.quantizers.kernels import is_recorded


class FrozenQuantizer(nn.Module):
    """Rounds to the points ``scale * level + offset`` as an input quantizer did, to the last bit.

    Levels that are consecutive integers, without an offset, go through ``torch.fake_quantize_per_tensor_affine``;
    others through a few elementwise operations. Its numbers are Python's: no cast of the module changes them, and they
    become constants of an exported graph.

    Args:
        scale: the step.
        levels: the levels at step 1, sorted.
        offset: the offset, or ``None``.
        uniform: whether the levels are consecutive integers.
    """

    def __init__(self, scale: float, levels: list[float], offset: float | None, uniform: bool) -> None:
        super().__init__()
        self.scale, self.levels, self.offset, self.uniform = scale, levels, offset, uniform
        self.register_forward_hook(ordinary_path)

    @classmethod
    @torch.no_grad()
    def of(cls, quantizer: Quantizer) -> "FrozenQuantizer":
        """What an active quantizer does from here on if it learns no more.

        Raises:
            ValueError: if it has several steps, or computes in a way of its own.
        """
        kind = type(quantizer)
        if any(getattr(kind, name) is not getattr(Quantizer, name) for name in ("forward", "quantize")):
            raise ValueError(f"its {kind.__name__} overrides `forward` or `quantize`, which cannot be frozen")
        if quantizer.step.numel() > 1:
            raise ValueError(f"its {kind.__name__} has {quantizer.step.numel()} steps, and an input has one")
        offset = None if quantizer.offset is None else float(quantizer.offset)
        return cls(float(quantizer.step), quantizer.levels.tolist(), offset, quantizer.uniform)

    def forward(self, x: Tensor, samples: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Quantize ``x``. Arguments as of :class:`~lightning_qinit.Quantizer`; ``samples`` plays no part."""
        if not x.is_floating_point():
            return x
        dtype = dtype or x.dtype
        if self.uniform and self.offset is None and x.dtype == torch.float32:
            low, high = int(self.levels[0]), int(self.levels[-1])
            y = torch.fake_quantize_per_tensor_affine(x, self.scale, 0, low, high)
            if not is_recorded():  # the operator makes a level of NaN, as integers do that an export stands for
                y = torch.where(x.isnan(), x, y)
            return y.to(dtype)
        wide = torch.promote_types(x.dtype, torch.float32)

        def constant(value: Any) -> Tensor:
            return torch.tensor(value, dtype=wide, device=x.device)

        levels = Levels(constant(self.levels), self.levels[0], self.levels[-1], self.uniform)
        offset = None if self.offset is None else constant(self.offset)
        return forward(x, constant(self.scale), offset, levels, dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}, {len(self.levels)} levels, offset={self.offset}"


def refuse_frozen(module: nn.Module) -> None:
    """Raise ``ValueError`` if the inputs of a module are quantized with steps that learn no more."""
    name = next((name for name, child in module.named_modules() if isinstance(child, FrozenQuantizer)), None)
    if name is not None:
        raise ValueError(
            f"`{name}` of {type(module).__name__} learns no more, since the module was folded: quantize the module "
            "that it was folded from."
        )


class Unquantized(nn.Module):
    """The identity, with the arguments of a quantizer."""

    def forward(self, x: Tensor, samples: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """``x``, whatever the other arguments."""
        return x
