"""Memory for values that are gone before anyone else can see them."""

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_qinit.quantizers.layout import Layout


class Scratch(threading.local):
    """A block of memory that is written again and again, in each thread its own.

    The C library gives large blocks back to the system when they are freed, so that on the CPU each quantized input
    would be paged in anew, which takes longer than to compute it. On other devices torch keeps what is freed.
    """

    def __init__(self) -> None:
        self.block = torch.empty(0, dtype=torch.uint8)

    def empty(self, layout: "Layout", dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room as of :meth:`Layout.empty`, in place of what was given before."""
        if device.type != "cpu":
            return layout.empty(dtype, device)
        size = layout.count * dtype.itemsize
        if len(self.block) < size:
            with torch.inference_mode(False):
                self.block = torch.empty(size, dtype=torch.uint8)
        return layout.restored(self.block[:size].view(dtype).view(layout.channels, -1))

    def release(self) -> None:
        """Give the memory back."""
        self.__init__()  # type: ignore[misc]
