"""BatchNorm statistics under quantization."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Statistics = list[tuple[nn.Module, Tensor, Tensor]]
"""A layer, its running mean and its running variance."""


def trained_norms(module: nn.Module) -> list[nn.Module]:
    """The normalization layers that keep running statistics and are in train mode: frozen ones are left alone."""
    return [
        child
        for child in module.modules()
        if isinstance(child, _NormBase) and child.training and child.running_mean is not None
    ]


def batch_statistics(norms: Sequence[nn.Module], run: Callable[[], None]) -> Statistics:
    """The plain average of the statistics of every batch that ``run`` passes through the module.

    Leaves the layers in train mode with these statistics: the caller puts the module back.
    """
    for norm in norms:
        assert isinstance(norm, _NormBase)
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    run()
    return [
        (norm, norm.running_mean.clone(), norm.running_var.clone())  # type: ignore[operator]  # trained_norms have them
        for norm in norms
        if bool(norm.num_batches_tracked)  # a layer that did not run keeps what it has
    ]


@torch.no_grad()
def set_statistics(statistics: Statistics) -> None:
    """Put the statistics into the layers, and nothing else."""
    for norm, mean, variance in statistics:
        assert isinstance(norm, _NormBase) and norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
