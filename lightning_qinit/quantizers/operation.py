"""The operations of layers with one weight, with their derivatives: what autograd would do, called by name."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Wanted = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
OfWeight = tuple[Sequence[Tensor], Tensor | None]


class Operation(Protocol):
    """A function of input, weight and bias, linear in the first two."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        """The gradients to input, weight and bias, in memory of their own; ``None`` for those that are not wanted."""

    def of_weight(self, grad: Tensor, inputs: Sequence[Tensor], weight: Tensor, of_bias: bool) -> OfWeight:
        """The gradients to the weight that there would be with each of the inputs; and that to the bias if wanted."""


def _each(operation: Operation, grad: Tensor, inputs: Sequence[Tensor], weight: Tensor, of_bias: bool) -> OfWeight:
    """As :meth:`Operation.of_weight`, input by input."""
    first, *others = inputs
    _, found, to_bias = operation.backward(grad, first, weight, (False, True, of_bias))
    rest = [operation.backward(grad, x, weight, (False, True, False))[1] for x in others]
    return [part for part in (found, *rest) if part is not None], to_bias


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

    def of_weight(self, grad: Tensor, inputs: Sequence[Tensor], weight: Tensor, of_bias: bool) -> OfWeight:
        return _each(self, grad, inputs, weight, of_bias)


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

    def of_weight(self, grad: Tensor, inputs: Sequence[Tensor], weight: Tensor, of_bias: bool) -> OfWeight:
        few = len(inputs) * weight.shape[1] <= ALIGNED
        if grad.is_cuda and few and self.groups == 1 and not self.transposed:
            return self.of_weight_at_once(grad, inputs, weight, of_bias)
        return _each(self, grad, inputs, weight, of_bias)

    def of_weight_at_once(self, grad: Tensor, inputs: Sequence[Tensor], weight: Tensor, of_bias: bool) -> OfWeight:
        """The same for a convolution without groups, not transposed: the inputs as channels of one."""
        count = len(inputs)
        joint = [torch.cat(list(inputs), 1)]
        (found,), to_bias = _each(self, grad, joint, torch.cat(count * [weight], 1), of_bias)
        return found.chunk(count, 1), to_bias
