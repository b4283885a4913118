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

    def empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for as many values, placed alike, which have no gaps; in place of what was given before."""
        block = self.blocks.get(dtype)
        if block is None or block.numel() < like.numel():
            with torch.inference_mode(False):
                block = self.blocks[dtype] = torch.empty(like.numel(), dtype=dtype, device="cpu")
        return block.as_strided(like.shape, like.stride())

    def release(self) -> None:
        """Give the memory back."""
        self.blocks.clear()
