"""Offsets of LSQ+ as integer zero points."""

import torch
from torch import nn

from lightning_qinit.functional.sharded import copy_whole
from lightning_qinit.insertion import named_quantizers, quantized_layers
from lightning_qinit.quantizers import LSQPlus

SPAN = 255  # between the outermost of the codes and the zero point, which share one 8-bit type


@torch.no_grad()
def snap_offsets(module: nn.Module) -> dict[str, int]:
    """Move every offset to a whole number of steps, in place, and let it and its step learn no more.

    Integer hardware adds an integer zero point, ``z = round(-offset / step)``; LSQ+ learns a real offset. Call this
    before the last epochs, so that the weights make up for the rounding. Where ``z`` would lie too far from the codes
    for 8 bits, it is the nearest that does not.

    Args:
        module: a calibrated module.

    Returns:
        The zero points by the names of the quantizers, as in the logs; empty if there are no offsets.
    """
    zero_points = {}
    for name, quantizer in named_quantizers(quantized_layers(module)).items():
        if quantizer.active and isinstance(quantizer, LSQPlus) and quantizer.offset is not None:
            assert quantizer.relative_offset is not None and quantizer.initial_offset is not None
            exact = -float(quantizer.offset) / float(quantizer.step)
            zero_points[name] = round(min(max(exact, quantizer.high - SPAN), quantizer.low + SPAN))
            offset = -zero_points[name] * quantizer.step
            relative = (offset - quantizer.initial_offset) / quantizer.initial_step
            copy_whole(quantizer.relative_offset, relative)
            quantizer.requires_grad_(False)
    return zero_points
