"""The operations of layers with one weight, with their derivatives: what autograd would do, called by name."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qinit.quantizers.kernels import is_recorded

Wanted = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
OfData = tuple[Tensor | None, Tensor | None, list[Tensor]]

ALIGNED = 8  # channels: a convolution of fewer takes a GPU as long
PARTS = {"cpu": 2**21, "cuda": 2**24}  # values that a CPU holds in its cache, and that keep a GPU busy


class Operation(Protocol):
    """A function of input, weight and bias, linear in the first two."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        """The gradients to input, weight and bias, in memory of their own; ``None`` for those that are not wanted."""

    def of_data(self, grad: Tensor, x: Tensor, changes: Sequence[Tensor], weight: Tensor, wanted: Wanted) -> OfData:
        """Those to weight and bias, of an input that needs none; and the inner product of ``grad`` with how the output
        changes with each change of the input."""


def _of_data(
    operation: Operation, grad: Tensor, x: Tensor, changes: Sequence[Tensor], weight: Tensor, wanted: Wanted
) -> OfData:
    to_weight, to_bias = operation.backward(grad, x, weight, wanted)[1:] if any(wanted) else (None, None)
    return to_weight, to_bias, [_along(operation, grad, change, weight) for change in changes]


def _along(operation: Operation, grad: Tensor, change: Tensor, weight: Tensor) -> Tensor:
    """The inner product of ``grad`` with how the output changes, by parts of the batch: all of it is large."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    most = PARTS.get(grad.device.type)
    size = len(grad) if most is None or is_recorded() else max(1, most * len(grad) // grad.numel())
    parts = zip(change.split(size), grad.split(size), strict=True)
    return torch.stack([(operation(part, weight, None).to(wide) * g.to(wide)).sum() for part, g in parts]).sum()


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

    def of_data(self, grad: Tensor, x: Tensor, changes: Sequence[Tensor], weight: Tensor, wanted: Wanted) -> OfData:
        grad, x, *changes = [values.reshape(-1, values.shape[-1]) for values in (grad, x, *changes)]
        return _of_data(self, grad, x, changes, weight, wanted)


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

    def of_data(self, grad: Tensor, x: Tensor, changes: Sequence[Tensor], weight: Tensor, wanted: Wanted) -> OfData:
        few = (1 + len(changes)) * weight.shape[1] <= ALIGNED
        if grad.is_cuda and few and wanted[1] and self.groups == 1 and not self.transposed:
            return self.of_data_at_once(grad, x, changes, weight, wanted)
        return _of_data(self, grad, x, changes, weight, wanted)

    def of_data_at_once(
        self, grad: Tensor, x: Tensor, changes: Sequence[Tensor], weight: Tensor, wanted: Wanted
    ) -> OfData:
        """The same for a convolution without groups, not transposed, as one with the changes as further channels.

        The output being linear in input and weight, what is asked of a change is the inner product of the weight with
        the gradient that it would have if the change were the input.
        """
        inputs = [x, *changes]
        _, found, to_bias = self.backward(grad, torch.cat(inputs, 1), torch.cat(len(inputs) * [weight], 1), wanted)
        assert found is not None
        to_weight, *by_change = found.chunk(len(inputs), 1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return to_weight, to_bias, [(part.to(wide) * weight.to(wide)).sum() for part in by_change]
