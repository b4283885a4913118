"""Embeddings, whose inputs are indices."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qinit.insertion.layers.base import QuantizedLayer


class QuantEmbedding(QuantizedLayer, nn.Embedding):
    float_class = nn.Embedding
    inputs = ()

    @property
    def linear(self) -> bool:
        return True

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return super().accepts(layer) and not layer.sparse  # a sparse gradient cannot pass through a quantizer

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
        return super().accepts(layer) and not layer.sparse

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
