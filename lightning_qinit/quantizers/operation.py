"""The operations of layers with one weight, with their derivatives: what autograd would do, called by name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Operation(ABC):
    """A function of input, weight and bias, linear in the first two."""

    @abstractmethod
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""

    @abstractmethod
    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
    ) -> Gradients:
        """The gradients to input, weight and bias; ``None`` for those that are not wanted."""


class Product(Operation):
    """``x @ weight.T + bias``."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
    ) -> Gradients:
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if of_x else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
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

    @property
    def _geometry(self) -> tuple[object, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self._geometry)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
    ) -> Gradients:
        sizes = [grad.shape[1]] if of_bias else None
        wanted = [of_x, of_weight, of_bias]
        return torch.ops.aten.convolution_backward(grad, x, weight, sizes, *self._geometry, wanted)
