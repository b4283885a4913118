"""Attention, as torch has it in one layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qinit.insertion.layers.base import QuantizedLayer


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
