"""Memory for values that are gone before anyone else can see them."""

import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """A block of the CPU's memory that is written again and again, in each thread its own, for each dtype one.

    The C library gives large blocks back to the system when they are freed, so that each quantized input would be paged
    in anew, which takes longer than to compute it.
    """

    def __init__(self) -> None:
        self.blocks: dict[torch.dtype, Tensor] = {}

    def empty(self, like: Tensor, dtype: torch.dtype, format: torch.memory_format = torch.preserve_format) -> Tensor:
        """Room for as many values, placed alike, which have no gaps, or as a memory format has it; in place of what was
        given before."""
        block = self.blocks.get(dtype)
        if block is None or block.numel() < like.numel():
            with torch.inference_mode(False):
                block = self.blocks[dtype] = torch.empty(like.numel(), dtype=dtype, device="cpu")
        if format == torch.preserve_format:
            return block.as_strided(like.shape, like.stride())
        block = block[: like.numel()]
        if format == torch.channels_last:
            batch, channels, height, width = like.shape
            return block.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return block.view(like.shape)

    def release(self) -> None:
        """Give the memory back."""
        self.blocks.clear()
