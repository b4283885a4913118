"""Memory for values that are gone before anyone else can see them."""

import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """A block of the CPU's memory that is written again and again, in each thread its own.

    The C library gives large blocks back to the system when they are freed, so that each quantized input would be paged
    in anew, which takes longer than to compute it.
    """

    def __init__(self) -> None:
        self.block = torch.empty(0, dtype=torch.uint8, device="cpu")

    def empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for as many values, placed alike, which have no gaps; in place of what was given before."""
        size = -(-like.numel() * dtype.itemsize // 8) * 8  # of which other dtypes have a whole number as well
        if len(self.block) < size:
            with torch.inference_mode(False):
                self.block = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self.block.view(dtype).as_strided(like.shape, like.stride())

    def release(self) -> None:
        """Give the memory back."""
        self.__init__()  # type: ignore[misc]
