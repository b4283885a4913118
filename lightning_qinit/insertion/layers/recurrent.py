"""Recurrent layers."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_qinit.insertion.layers.base import QuantizedLayer


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
