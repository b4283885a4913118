"""Layers that quantize their weight and their input, and the one table that says which.

A layer becomes a quantized one by swapping the class of the object in place. The Parameter objects, their names
and ``layer.weight`` stay, and so do deepcopy, pickle and everything that holds a reference to the layer.
"""

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_qinit.config import LayerConfig
from lightning_qinit.quantizers import Quantizer


class QuantizedLayer(nn.Module):
    """Mixin of all quantized layers: ``weight_quantizer`` and ``input_quantizer``, either of which may be ``None``.

    Attributes:
        quant_config: the settings that the layer was inserted with.
    """

    float_class: ClassVar[type[nn.Module]]
    output_axis: ClassVar[int] = 0
    """The axis of the weight along which output channels run."""

    weight: Tensor
    quant_config: LayerConfig
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The quantized input and the quantized weight."""
        weight = self.weight
        if self.weight_quantizer is not None:
            weight = self.weight_quantizer(weight)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return x, weight

    def quantizers(self) -> dict[str, Quantizer]:
        """Those that there are, by what they quantize: ``"weight"`` and ``"input"``."""
        both = {"weight": self.weight_quantizer, "input": self.input_quantizer}
        return {what: quantizer for what, quantizer in both.items() if quantizer is not None}


class QuantLinear(QuantizedLayer, nn.Linear):
    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*self.quantized(input), self.bias)


class QuantConv1d(QuantizedLayer, nn.Conv1d):
    float_class = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(*self.quantized(input), self.bias)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    float_class = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(*self.quantized(input), self.bias)


class QuantConv3d(QuantizedLayer, nn.Conv3d):
    float_class = nn.Conv3d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(*self.quantized(input), self.bias)


class _QuantConvTranspose(QuantizedLayer, _ConvTransposeNd):
    # The weight is (in, out / groups, ...): with groups, one step serves the same channel of every group.
    output_axis = 1
    convolve: ClassVar[Callable[..., Tensor]]

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
        x, weight = self.quantized(input)
        convolve = type(self).convolve
        return convolve(x, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation)


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    float_class = nn.ConvTranspose1d
    convolve = F.conv_transpose1d


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    float_class = nn.ConvTranspose2d
    convolve = F.conv_transpose2d


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    float_class = nn.ConvTranspose3d
    convolve = F.conv_transpose3d


# The table: a layer is quantized if its exact type is a key here. Subclasses are not: their forward is their own.
QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    layer.float_class: layer
    for layer in (
        QuantLinear,
        QuantConv1d,
        QuantConv2d,
        QuantConv3d,
        QuantConvTranspose1d,
        QuantConvTranspose2d,
        QuantConvTranspose3d,
    )
}
