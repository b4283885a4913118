"""Convolutions and transposed convolutions."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_qinit.insertion.layers.one_weight import OneWeight
from lightning_qinit.quantizers.operation import Convolution


class _QuantConv(OneWeight, _ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        operation = None
        # what is convolved otherwise may be a padded copy
        if input.dim() == self.weight.dim() and self.padding_mode == "zeros" and not isinstance(self.padding, str):
            operation = Convolution(self.stride, self.padding, self.dilation, False, self.output_padding, self.groups)
        return self.compute(input, operation, self._conv_forward)


class QuantConv1d(_QuantConv, nn.Conv1d):
    float_class = nn.Conv1d


class QuantConv2d(_QuantConv, nn.Conv2d):
    float_class = nn.Conv2d


class QuantConv3d(_QuantConv, nn.Conv3d):
    float_class = nn.Conv3d


class _QuantConvTranspose(OneWeight, _ConvTransposeNd):
    # The weight is (in, out / groups, ...): with groups, one step serves the same channel of every group.
    output_axis = 1
    convolve: ClassVar[Callable[..., Tensor]]

    def outputs_fed(self, weight: Tensor) -> Tensor:
        # An output channel of a group is one output for every phase: with a stride, a position of the output meets only
        # those elements of the kernel that are a multiple of the stride apart from each other.
        device, kernel = weight.device, weight.shape[2:]
        index = torch.arange(self.groups * weight.shape[1], device=device).view(self.groups, -1)
        index = index.repeat_interleave(weight.shape[0] // self.groups, dim=0)
        for size, stride, dilation in zip(kernel, self.stride, self.dilation, strict=True):
            phase = torch.arange(size, device=device) * dilation % stride
            index = index[..., None] * stride + phase
        return index

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = self.weight.dim() - 2
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]  # torch types these as tuples and the method as lists
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            dims,
            self.dilation,  # type: ignore[arg-type]
        )
        settings = self.stride, self.padding, output_padding, self.groups, self.dilation
        operation = None
        if input.dim() == self.weight.dim() and not isinstance(self.padding, str):
            operation = Convolution(self.stride, self.padding, self.dilation, True, output_padding, self.groups)
        convolve = type(self).convolve
        return self.compute(input, operation, lambda x, w, bias: convolve(x, w, bias, *settings))


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    float_class = nn.ConvTranspose1d
    convolve = F.conv_transpose1d


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    float_class = nn.ConvTranspose2d
    convolve = F.conv_transpose2d


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    float_class = nn.ConvTranspose3d
    convolve = F.conv_transpose3d
