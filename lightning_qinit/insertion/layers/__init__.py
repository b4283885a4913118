"""Layers that quantize their weight and their input, and the one table that says which.

A layer becomes a quantized one by swapping the class of the object in place. The Parameter objects, their names
and ``layer.weight`` stay, and so do deepcopy, pickle and everything that holds a reference to the layer.
"""

from torch import nn

from lightning_qinit.insertion.layers.attention import QuantMultiheadAttention
from lightning_qinit.insertion.layers.base import QuantizedLayer as QuantizedLayer
from lightning_qinit.insertion.layers.base import held as held
from lightning_qinit.insertion.layers.convolution import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from lightning_qinit.insertion.layers.embedding import QuantEmbedding, QuantEmbeddingBag
from lightning_qinit.insertion.layers.one_weight import QuantLinear, QuantOutProjection
from lightning_qinit.insertion.layers.recurrent import QuantGRU, QuantLSTM, QuantRNN

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
