"""Layers of one weight, in which their output is linear."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_qinit.insertion.layers.base import QuantizedLayer
from lightning_qinit.quantizers import Quantizer
from lightning_qinit.quantizers.fused import Operand, fused, on_data
from lightning_qinit.quantizers.kernels import is_recorded
from lightning_qinit.quantizers.operation import Operation, Product

PRODUCT = Product()


class OneWeight(QuantizedLayer):
    weight: Tensor
    bias: Any  # a parameter, or None

    @property
    def linear(self) -> bool:
        return True

    def inputs_met(self, what: str) -> tuple[str, ...]:
        return self.inputs

    def compute(self, x: Tensor, operation: Operation | None, plain: Callable[..., Tensor]) -> Tensor:
        """The operation on the quantized input and the quantized weight, in the dtype that autocast would cast them to.

        Args:
            x: the input.
            operation: the operation, to be done in one with quantization; ``None`` if that is not to be had.
            plain: the operation as a function of input, weight and bias.
        """
        device = x.device.type
        dtype = None
        if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        bias = self.bias if self.bias is None or dtype is None else self.bias.to(dtype)
        if operation is not None and not is_recorded() and type(x) is Tensor and x.numel():
            inputs, weights = (
                _operand(self.input_quantizer, x, dtype),
                _operand(self.weight_quantizer, self.weight, dtype),
            )
            if inputs is not None and weights is not None and (inputs.how or weights.how):
                return fused(operation, inputs, weights, bias)
        if operation is not None and is_compiling() and torch.is_grad_enabled() and not x.requires_grad:
            inputs = _operand(self.input_quantizer, x, dtype)
            if inputs is not None and inputs.how is not None and inputs.watch is None and inputs.how.scale.numel() == 1:
                weight = self.quantize_weight(self.weight, dtype=dtype)
                return on_data(operation, inputs.x, inputs.how, weight, bias)
        return plain(self.quantize_input(x, dtype=dtype), self.quantize_weight(self.weight, dtype=dtype), bias)


def _operand(quantizer: nn.Module | None, x: Tensor, dtype: torch.dtype | None) -> Operand | None:
    if quantizer is None:
        return Operand(x if dtype is None else x.to(dtype))
    return quantizer.operand(x, dtype) if isinstance(quantizer, Quantizer) else None


class QuantLinear(OneWeight, nn.Linear):
    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input, PRODUCT, F.linear)


class QuantOutProjection(QuantLinear):
    """The output projection of an attention layer, a subclass of ``Linear`` that torch keeps for itself."""

    float_class = NonDynamicallyQuantizableLinear
