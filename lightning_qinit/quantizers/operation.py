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
MANY, LARGE = 16, 2**18  # channels and values of images from which on a CPU gains by having the channels last
PARTS = {"cpu": 2**21, "cuda": 2**24}  # values that a CPU holds in its cache, and that keep a GPU busy


class Operation(Protocol):
    """A function of input, weight and bias, linear in the first two."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""

    def fastest(self, x: Tensor) -> torch.memory_format:
        """How the operation would have its input lie in memory, if there were the choice."""

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        """The gradients to input, weight and bias, in memory of their own; ``None`` for those that are not wanted."""

    def of_data(
        self, grad: Tensor, x: Tensor, changes: Sequence[Tensor], weight: Tensor, of_weight: bool, of_bias: bool
    ) -> OfData:
        """The gradients to weight and bias that are wanted, where the input needs none; and the inner product of
        ``grad`` with how the output changes with each change of the input."""


def _apart(
    operation: Operation,
    grad: Tensor,
    x: Tensor,
    changes: Sequence[Tensor],
    weight: Tensor,
    of_weight: bool,
    of_bias: bool,
) -> OfData:
    _, to_weight, to_bias = operation.backward(grad, x, weight, (False, of_weight, of_bias))
    return to_weight, to_bias, [_along(operation, grad, change, weight) for change in changes]


def _along(operation: Operation, grad: Tensor, change: Tensor, weight: Tensor) -> Tensor:
    """The inner product of ``grad`` with how the output changes, by parts of the batch: all of it is large."""
    wide, most = torch.promote_types(grad.dtype, torch.float32), PARTS.get(grad.device.type)
    if grad.dtype == torch.float16:  # a change is one in units of the step, which its range is too small for
        change, weight = change.to(wide), weight.to(wide)
    count = 1 if most is None or is_recorded() else min(len(grad), -(-grad.numel() // most))
    parts = zip(change.chunk(count), grad.chunk(count), strict=True)
    inner = [(operation(part, weight, None).to(wide) * g.to(wide)).sum() for part, g in parts]
    return inner[0] if count == 1 else torch.stack(inner).sum()


class Product(NamedTuple):
    """``x @ weight.T + bias``."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def fastest(self, x: Tensor) -> torch.memory_format:
        return torch.preserve_format

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if wanted[0] else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )

    def of_data(
        self, grad: Tensor, x: Tensor, changes: Sequence[Tensor], weight: Tensor, of_weight: bool, of_bias: bool
    ) -> OfData:
        grad, x, *changes = [values.reshape(-1, values.shape[-1]) for values in (grad, x, *changes)]
        return _apart(self, grad, x, changes, weight, of_weight, of_bias)


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

    def fastest(self, x: Tensor) -> torch.memory_format:
        # What oneDNN is given with channels first it lays out anew for each use: input, output, the gradients to both.
        # (Not with dilation: in bfloat16 it finds a wrong gradient to the weight then.)
        large = x.dim() == 4 and x.shape[1] >= MANY and x.numel() >= LARGE
        plain = not self.transposed and all(step == 1 for step in self.dilation)
        if x.is_cpu and large and plain and torch.backends.mkldnn.is_available():
            return torch.channels_last
        return torch.preserve_format

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        of_input, of_weight, of_bias = wanted
        if of_bias and not of_weight:  # for which libraries would find the gradient to the weight as well
            to_input, _, _ = self.backward(grad, x, weight, (of_input, False, False))
            return to_input, None, grad.sum((0, *range(2, grad.dim())))
        if not any(wanted):
            return None, None, None
        sizes = [grad.shape[1]] if of_bias else None
        result: Gradients = torch.ops.aten.convolution_backward(grad, x, weight, sizes, *self, wanted)
        return result

    def of_data(
        self, grad: Tensor, x: Tensor, changes: Sequence[Tensor], weight: Tensor, of_weight: bool, of_bias: bool
    ) -> OfData:
        few = (1 + len(changes)) * weight.shape[1] <= ALIGNED
        if grad.is_cuda and few and of_weight and self.groups == 1 and not self.transposed:
            return self.at_once(grad, x, changes, weight, of_bias)
        return _apart(self, grad, x, changes, weight, of_weight, of_bias)

    def at_once(self, grad: Tensor, x: Tensor, changes: Sequence[Tensor], weight: Tensor, of_bias: bool) -> OfData:
        """As :meth:`of_data`, with the gradient to the weight, for a convolution without groups, not transposed: one
        with the changes as further channels.

        The output being linear in input and weight, what is asked of a change is the inner product of the weight with
        the gradient that it would have if the change were the input.
        """
        inputs = [x, *changes]
        joint, weights = torch.cat(inputs, 1), torch.cat(len(inputs) * [weight], 1)
        _, found, to_bias = self.backward(grad, joint, weights, (False, True, of_bias))
        assert found is not None
        to_weight, *by_change = found.chunk(len(inputs), 1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return to_weight, to_bias, [(part.to(wide) * weight.to(wide)).sum() for part in by_change]
