"""BatchNorm statistics under quantization."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Statistics = list[tuple[nn.Module, Tensor, Tensor, Tensor]]
"""A layer, its running mean and variance, and the number of batches that they are the average of."""


def trained_norms(module: nn.Module) -> list[nn.Module]:
    """The normalization layers that keep running statistics and are not frozen.

    Frozen are those in eval mode while the module as a whole is in train mode.
    """
    return [
        child
        for child in module.modules()
        if isinstance(child, _NormBase) and (child.training or not module.training) and child.running_mean is not None
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
        (norm, norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone())  # type: ignore[operator]  # trained_norms have them
        for norm in norms
    ]


@torch.no_grad()
def set_statistics(statistics: Statistics) -> None:
    """Put the statistics into the layers, and nothing else; a layer that did not run keeps its own."""
    for norm, mean, variance, batches in statistics:
        assert isinstance(norm, _NormBase) and norm.running_mean is not None and norm.running_var is not None
        if int(batches) > 0:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
