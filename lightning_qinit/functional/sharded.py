"""Tensors that are spread over ranks (``DTensor``: FSDP2, tensor parallelism)."""

import torch
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of one that is spread over ranks, gathered, so that all of them must call this."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@torch.no_grad()
def copy_whole(target: Tensor, values: Tensor) -> None:
    """Copy all values into a tensor, into each rank's part of it if it is spread over ranks."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor  # not in every build of torch

        assert isinstance(target, DTensor)
        values = distribute_tensor(values, target.device_mesh, target.placements)
    target.copy_(values)
