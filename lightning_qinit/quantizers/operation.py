"""The operations of layers with one weight, with their derivatives: what autograd would do, called by name."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Wanted = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Operation(Protocol):
    """A function of input, weight and bias, linear in the first two."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        """The gradients to input, weight and bias, in memory of their own; ``None`` for those that are not wanted."""

    def of_weight(self, grad: Tensor, inputs: Sequence[Tensor], weight: Tensor) -> Sequence[Tensor]:
        """The gradients to the weight that there would be with each of the inputs."""


class Product(NamedTuple):
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

    def of_weight(self, grad: Tensor, inputs: Sequence[Tensor], weight: Tensor) -> Sequence[Tensor]:
        rows = grad.reshape(-1, grad.shape[-1])
        return [rows.T @ x.reshape(-1, x.shape[-1]) for x in inputs]


ALIGNED = 8  # channels: a convolution of fewer takes a GPU as long


class Convolution(NamedTuple):  # torch.compile knows named tuples, where a class of our own breaks it in torch 2.11
    """A convolution over a batch, in any number of dimensions, transposed or not."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        sizes = [grad.shape[1]] if wanted[2] else None
        result: Gradients = torch.ops.aten.convolution_backward(grad, x, weight, sizes, *self, wanted)
        return result

    def of_weight(self, grad: Tensor, inputs: Sequence[Tensor], weight: Tensor) -> Sequence[Tensor]:
        few = len(inputs) * weight.shape[1] <= ALIGNED
        if grad.is_cuda and few and self.groups == 1 and not self.transposed:
            return self.of_weight_at_once(grad, inputs, weight)
        return [self._of_weight(grad, x, weight) for x in inputs]

    def of_weight_at_once(self, grad: Tensor, inputs: Sequence[Tensor], weight: Tensor) -> Sequence[Tensor]:
        """The same for a convolution without groups, not transposed: the inputs as channels of one."""
        count = len(inputs)
        return self._of_weight(grad, torch.cat(list(inputs), 1), torch.cat(count * [weight], 1)).chunk(count, 1)

    def _of_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        found = self.backward(grad, x, weight, (False, True, False))[1]
        assert found is not None
        return found
