"""Tensors that are spread over ranks (``DTensor``: FSDP2, tensor parallelism)."""

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of one that is spread over ranks, gathered, so that all of them must call this."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def spread_like(values: Tensor, target: Tensor) -> Tensor:
    """All values of a tensor, spread over ranks as another is."""
    if not is_sharded(target):
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor  # not in every build of torch

    assert isinstance(target, DTensor)
    return distribute_tensor(values, target.device_mesh, target.placements)


@torch.no_grad()
def copy_whole(target: Tensor, values: Tensor) -> None:
    """Copy all values into a tensor, into each rank's part of it if it is spread over ranks."""
    target.copy_(spread_like(values, target))
