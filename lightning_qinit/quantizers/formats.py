"""How images lie in memory: with their channels first, as torch makes them, or last."""

import torch
from torch import Tensor

from lightning_qinit.quantizers import cpu
from lightning_qinit.quantizers.kernels import Kernels, written_for
from lightning_qinit.quantizers.scratch import Scratch

FIRST, LAST = torch.contiguous_format, torch.channels_last


def is_last(x: Tensor) -> bool:
    """Whether images have their channels last; those of one channel or one pixel have them first as well.

    Of images with gaps between their values it tells how a result of theirs would lie.
    """
    if x.dim() != 4:
        return False
    like = x if x.is_contiguous() or x.is_contiguous(memory_format=LAST) else torch.empty_like(x, device="meta")
    return like.is_contiguous(memory_format=LAST)


def laid_out(x: Tensor, to: torch.memory_format, kernels: Kernels, scratch: Scratch | None = None) -> Tensor:
    """Images with their channels first or last: themselves, if they are.

    Args:
        x: the images.
        to: the format.
        kernels: whether to use compiled kernels (see :mod:`~lightning_qinit.quantizers.kernels`).
        scratch: where the result may lie; valid until it is asked for memory again.
    """
    if x.is_contiguous(memory_format=to):
        return x
    if x.is_cpu and x.is_contiguous(memory_format=FIRST if to == LAST else LAST) and written_for(x, x.dtype, kernels):
        return cpu.laid_out(x, to, scratch)
    return x.contiguous(memory_format=to)
