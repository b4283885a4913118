"""Codes of 1 to 8 bits as a stream of bytes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers ``0 .. 2^bits - 1``: eight of them to ``bits`` bytes, the first in the lowest bits.

    Args:
        codes: of any shape and integer dtype; taken in row-major order.
        bits: 1 to 8.

    Returns:
        uint8, ``(ceil(n / 8) * bits,)``; the last group is filled with zeros.
    """
    flat = codes.flatten().to(torch.int64)
    groups = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    words = (groups << bits * torch.arange(8, device=codes.device)).sum(1)  # bits of different codes do not meet
    return (words[:, None] >> 8 * torch.arange(bits, device=codes.device) & 255).to(torch.uint8).flatten()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes that :func:`pack` packed: uint8, ``(count,)``."""
    groups = packed.view(-1, bits).to(torch.int64)
    words = (groups << 8 * torch.arange(bits, device=packed.device)).sum(1)
    codes = words[:, None] >> bits * torch.arange(8, device=packed.device) & 2**bits - 1
    return codes.flatten()[:count].to(torch.uint8)
