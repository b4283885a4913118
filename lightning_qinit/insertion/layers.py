"""Layers that quantize their weight and their input, and the one table that says which.

A layer becomes a quantized one by swapping the class of the object in place. The Parameter objects, their names
and ``layer.weight`` stay, and so do deepcopy, pickle and everything that holds a reference to the layer.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import PackedSequence

from lightning_qinit.config import LayerConfig
from lightning_qinit.quantizers import Quantizer
from lightning_qinit.quantizers.fused import Operand, fused
from lightning_qinit.quantizers.operation import Convolution, Operation, Product

PRODUCT = Product()


class QuantizedLayer(nn.Module):
    """Mixin of all quantized layers.

    A subclass states which of its parameters are quantized weights, which inputs it quantizes, and computes its
    forward pass with :meth:`quantize_weight` and :meth:`quantize_input`. A row in ``QUANTIZED_LAYERS`` puts it to use.

    Attributes:
        weight_quantizer: a quantizer; several by the name of the parameter, in layers with several; or ``None``.
        input_quantizer: a quantizer; several by the name of the input; or ``None``.
        quant_config: the settings that the layer was inserted with.
    """

    float_class: ClassVar[type[nn.Module]]
    output_axis: ClassVar[int] = 0
    """The axis of the weights along which output channels run."""
    inputs: ClassVar[tuple[str, ...]] = ("input",)
    """Names of the inputs that are quantized."""
    optional_inputs: ClassVar[tuple[str, ...]] = ()
    """Those of them that may never be seen, because another quantizer serves them."""

    quant_config: LayerConfig
    weight_quantizer: nn.Module | None
    input_quantizer: nn.Module | None

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Whether a float layer of the right type can be quantized."""
        return True

    @classmethod
    def weight_names(cls, layer: nn.Module) -> tuple[str, ...]:
        """Names of the parameters that are quantized as weights."""
        return ("weight",)

    @classmethod
    def batch_axis(cls, layer: nn.Module) -> int:
        """The axis of the inputs that runs over samples."""
        return 0

    @property
    def linear(self) -> bool:
        """Whether the output is linear in the one weight, so that it is known which inputs each element meets."""
        return False

    def weights(self) -> dict[str, Tensor]:
        """The parameters that have a quantizer, by the same names as in :meth:`quantizers`."""
        names = self.weight_names(self)
        found = {name: getattr(self, name) for name in names}
        if len(names) == 1:
            found = {"weight": found[names[0]]}
        return found if self.weight_quantizer is not None else {}

    def inputs_met(self, what: str) -> tuple[str, ...]:
        """Which inputs a weight is multiplied with, and its outputs the sums of.

        Args:
            what: one of :meth:`weights`.

        Returns:
            Names from ``inputs``, for equal parts along the output axis in their order; none if the weight meets
            nothing that the layer is given, or is not summed over.
        """
        return ()

    def outputs_fed(self, weight: Tensor) -> Tensor:
        """For every element of a weight a number of the output that it feeds, broadcastable to the weight."""
        shape = [1] * weight.dim()
        shape[self.output_axis] = -1
        return torch.arange(weight.shape[self.output_axis], device=weight.device).view(shape)

    def weight_quantizers(self) -> dict[str, Quantizer]:
        """By what they quantize: ``"weight"``, or the names of the parameters."""
        return _by_name(self.weight_quantizer, "weight")

    def parameter_quantizers(self) -> dict[str, Quantizer]:
        """Those of weights by the names of the parameters, also where there is only one."""
        quantizers = self.weight_quantizers()
        return dict(zip(self.weight_names(self), quantizers.values(), strict=True)) if quantizers else {}

    def input_quantizers(self) -> dict[str, Quantizer]:
        """By what they quantize: ``"input"``, or the names of the inputs."""
        return _by_name(self.input_quantizer, "input")

    def float_inputs(self) -> list[str]:
        """The names of the inputs that have no quantizer."""
        return [what for what in self.inputs if what not in self.input_quantizers()]

    def quantizers(self) -> dict[str, Quantizer]:
        """All that there are, those of weights first."""
        return self.weight_quantizers() | self.input_quantizers()

    def quantize_weight(self, weight: Tensor, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """A weight as it is used: quantized, or as it is if weights stay in float.

        Args:
            weight: the weight.
            name: its name, in layers with several.
            dtype: of the quantized weight; ``None``: its own.
        """
        return _quantize(self.weight_quantizer, weight, name, dtype=dtype)

    def quantize_input(
        self, x: Tensor, name: str = "input", samples: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """An input as it is used: quantized, or as it is if inputs stay in float.

        Args:
            x: the input.
            name: one of ``inputs``.
            samples: how many samples it holds, where that is not the size of its batch axis.
            dtype: of the quantized input; ``None``: its own.
        """
        return _quantize(self.input_quantizer, x, name, samples, dtype)


def held(named: Mapping[str, nn.Module]) -> nn.Module | None:
    """How a layer holds its quantizers: alone, or several by name; ``None`` for none."""
    return nn.ModuleDict(named) if len(named) > 1 else next(iter(named.values()), None)


def _by_name(held: nn.Module | None, role: str) -> dict[str, Quantizer]:
    named = dict(held.items()) if isinstance(held, nn.ModuleDict) else {role: held}
    # what an export has put in their place learns no more
    return {name: quantizer for name, quantizer in named.items() if isinstance(quantizer, Quantizer)}


def _quantize(
    held: nn.Module | None,
    x: Tensor,
    name: str,
    samples: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    quantizer = held[name] if isinstance(held, nn.ModuleDict) else held
    return x if quantizer is None else quantizer(x, samples, dtype)


class _OneWeight(QuantizedLayer):
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
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        if operation is not None and not torch.compiler.is_compiling() and type(x) is Tensor and x.numel():
            inputs, weights = (
                _operand(self.input_quantizer, x, dtype),
                _operand(self.weight_quantizer, self.weight, dtype),
            )
            if inputs is not None and weights is not None and (inputs.how or weights.how):
                bias = self.bias if self.bias is None or dtype is None else self.bias.to(dtype)
                with torch.autocast(device, enabled=False) if dtype else nullcontext():
                    return fused(operation, inputs, weights, bias)
        return plain(self.quantize_input(x, dtype=dtype), self.quantize_weight(self.weight, dtype=dtype), self.bias)


def _operand(quantizer: nn.Module | None, x: Tensor, dtype: torch.dtype | None) -> Operand | None:
    if quantizer is None:
        return Operand(x if dtype is None else x.to(dtype))
    return quantizer.operand(x, dtype) if isinstance(quantizer, Quantizer) else None


class QuantLinear(_OneWeight, nn.Linear):
    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input, PRODUCT, F.linear)


class _QuantConv(_OneWeight, _ConvNd):
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


class _QuantConvTranspose(_OneWeight, _ConvTransposeNd):
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


class QuantEmbedding(QuantizedLayer, nn.Embedding):
    float_class = nn.Embedding
    inputs = ()

    @property
    def linear(self) -> bool:
        return True

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return not layer.sparse  # a sparse gradient cannot pass through a quantizer

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None:  # as in float, rows looked up are renormalized in place
            F.embedding(input, self.weight.detach(), self.padding_idx, self.max_norm, self.norm_type)
        weight = self.quantize_weight(self.weight)
        return F.embedding(input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class QuantEmbeddingBag(QuantizedLayer, nn.EmbeddingBag):
    float_class = nn.EmbeddingBag
    inputs = ()

    @property
    def linear(self) -> bool:
        return self.mode == "sum"

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return not layer.sparse

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if self.max_norm is not None:
            F.embedding(input, self.weight.detach(), None, self.max_norm, self.norm_type)
        return F.embedding_bag(
            input,
            self.quantize_weight(self.weight),
            offsets,
            scale_grad_by_freq=self.scale_grad_by_freq,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )


class QuantOutProjection(QuantLinear):
    """The output projection of an attention layer, a subclass of ``Linear`` that torch keeps for itself."""

    float_class = NonDynamicallyQuantizableLinear


class QuantMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """The projections of query, key and value; that of the output is a layer of its own, ``out_proj``."""

    float_class = nn.MultiheadAttention
    inputs = ("query", "key", "value")
    optional_inputs = ("key", "value")

    @classmethod
    def weight_names(cls, layer: nn.Module) -> tuple[str, ...]:
        separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return ("in_proj_weight",) if layer._qkv_same_embed_dim else separate

    @classmethod
    def batch_axis(cls, layer: nn.Module) -> int:
        return 0 if layer.batch_first else 1

    def inputs_met(self, what: str) -> tuple[str, ...]:
        return self.inputs if what == "weight" else ({"q": "query", "k": "key", "v": "value"}[what[0]],)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        q = self.quantize_input(query, "query")
        k = q if key is query else self.quantize_input(key, self._calibrated("key"))
        v = q if value is query else k if value is key else self.quantize_input(value, self._calibrated("value"))
        swap = self.batch_first and query.dim() == 3
        if swap:  # the function takes (sequence, batch, features), and projects once what is one object
            turned = {id(x): x.transpose(0, 1) for x in (q, k, v)}
            q, k, v = (turned[id(x)] for x in (q, k, v))
        packed = self.quantize_weight(self.in_proj_weight) if self._qkv_same_embed_dim else None
        separate = (
            {}
            if self._qkv_same_embed_dim
            else {name: self.quantize_weight(getattr(self, name), name) for name in self.weight_names(self)}
        )
        # attention proper: with the identity for an output projection, so that the quantized one comes after it
        attended, weights = F.multi_head_attention_forward(
            q,
            k,
            v,
            self.embed_dim,
            self.num_heads,
            packed,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            torch.eye(self.embed_dim, dtype=q.dtype, device=q.device),
            None,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            **separate,
        )
        output = self.out_proj(attended)
        return (output.transpose(0, 1) if swap else output), weights

    def _calibrated(self, name: str) -> str:
        """``name``; ``"query"`` if in calibration both were one tensor, and only now they are not."""
        quantizers = self.input_quantizers()
        serves = bool(quantizers) and quantizers["query"].is_calibrated and not quantizers[name].is_calibrated
        return "query" if serves else name


class _QuantRecurrent(QuantizedLayer, nn.RNNBase):
    """All weights, input-to-hidden and hidden-to-hidden, and the input of the first layer.

    The hidden states and the inputs of further layers live inside torch's operator and stay in float.
    """

    @classmethod
    def weight_names(cls, layer: nn.Module) -> tuple[str, ...]:
        names: Any = layer._flat_weights_names  # torch gives no type
        return tuple(name for name in names if name.startswith("weight"))

    @classmethod
    def batch_axis(cls, layer: nn.Module) -> int:
        return 0 if layer.batch_first else 1

    def inputs_met(self, what: str) -> tuple[str, ...]:
        return self.inputs if what.startswith("weight_ih_l0") else ()

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            samples = int(input.batch_sizes[0])  # on the CPU wherever the data are
            input = input._replace(data=self.quantize_input(input.data, samples=samples))
        else:
            input = self.quantize_input(input)
        self._update_flat_weights()  # torch does so below where weights are other objects now, as in torch.export
        flat: Any = self._flat_weights
        self._flat_weights = [
            self.quantize_weight(weight, name) if name.startswith("weight") else weight
            for name, weight in zip(self._flat_weights_names, flat, strict=True)
        ]
        try:
            return super().forward(input, hx)
        finally:
            self._flat_weights = flat


class QuantRNN(_QuantRecurrent, nn.RNN):
    float_class = nn.RNN


class QuantLSTM(_QuantRecurrent, nn.LSTM):
    float_class = nn.LSTM


class QuantGRU(_QuantRecurrent, nn.GRU):
    float_class = nn.GRU


# The table: a layer is quantized if its exact type is a key here. Subclasses are not: their forward is their own.
# For a layer type of your own, write `class QuantMine(QuantizedLayer, Mine)` with a forward that quantizes, and add
# `QUANTIZED_LAYERS[Mine] = QuantMine`.
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
        QuantEmbedding,
        QuantEmbeddingBag,
        QuantMultiheadAttention,
        QuantOutProjection,
        QuantRNN,
        QuantLSTM,
        QuantGRU,
    )
}
