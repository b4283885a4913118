"""The mode in which a module is calibrated."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def calibration_mode(module: nn.Module) -> None:
    """Eval mode, except for normalization layers without statistics yet, which use those of the batch.

    Eval mode keeps dropout off and normalizes as a trained network does. In a network that was never trained the
    running statistics are mean 0 and variance 1, which says nothing about its activations in training: layer after
    layer they would be off by orders of magnitude. Such layers update their statistics: keep them (``restored``).
    """
    module.eval()
    for child in module.modules():
        if isinstance(child, _NormBase) and untrained(child):
            child.train()


def untrained(norm: _NormBase) -> bool:
    """Whether running statistics are still those that a layer is built with."""
    # old checkpoints come without the count of batches, so a count of 0 alone does not tell
    mean, variance, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or variance is None or batches is None:
        return False
    return bool(batches == 0) and bool((mean == 0).all()) and bool((variance == 1).all())
