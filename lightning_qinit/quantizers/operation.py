"""The operations of layers with one weight, with their derivatives: what autograd would do, called by name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Wanted = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Operation(ABC):
    """A function of input, weight and bias, linear in the first two."""

    @abstractmethod
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""

    @abstractmethod
    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        """The gradients to input, weight and bias, in memory of their own; ``None`` for those that are not wanted."""


class Product(Operation):
    """``x @ weight.T + bias``."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if wanted[0] else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


@dataclass(frozen=True)
class Convolution(Operation):
    """A convolution over a batch, in any number of dimensions, transposed or not."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, **vars(self))

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        sizes = [grad.shape[1]] if wanted[2] else None
        result: Gradients = torch.ops.aten.convolution_backward(
            grad, x, weight, sizes, **vars(self), output_mask=wanted
        )
        return result
