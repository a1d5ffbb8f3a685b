"""torch's transformers without some of their heads and channels.

torch's own attention demands that all heads together are as wide as its input. After surgery they
are not; a module that lost something becomes a subclass, with the same parameters by the same
names. The modules around it decided or noted something about sizes when they were built.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def forget_dense_widths(modules: Iterable[nn.Module]) -> None:
    """Makes torch's transformers, in place, forget what they derived from their dense widths.

    An encoder decided that its layers take nested tensors, for which pruned layers have no code;
    a transformer wrote down how wide its inputs are.

    Args:
        modules: All modules of the pruned network.
    """
    for module in modules:
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = module.enable_nested_tensor = False
        elif isinstance(module, nn.Transformer):
            layers = (layer for layer in module.modules() if isinstance(layer, _LAYERS))
            module.d_model = next((layer.linear1.in_features for layer in layers), module.d_model)


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention whose widths are those of its weights.

    `head_dim` stays what it was in the dense network: it scales the scores.
    """

    @staticmethod
    def convert_unless_whole(module: nn.MultiheadAttention) -> None:
        """Makes a module one of this class, in place, if torch's own cannot run its weights."""
        packed = module.in_proj_weight is not None
        rows, inputs = (module.in_proj_weight if packed else module.q_proj_weight).shape
        heads = module.num_heads * module.head_dim
        if (rows // 3 if packed else rows) == inputs == module.embed_dim == heads:
            return
        module.__class__ = PrunedMultiheadAttention
        module._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer off its fused path

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
        """See `nn.MultiheadAttention.forward`."""
        single = query.dim() == 2
        inputs = [x.unsqueeze(0) if single else x for x in (query, key, value)]
        if not self.batch_first and not single:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = self._project(*inputs)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        scale = self.head_dim**-0.5
        weights = None
        if need_weights:
            scores = (q * scale) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if single else weights
        else:
            mixed = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal and mask is None, scale=scale
            )
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if single:
            return output.squeeze(0), weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        weights = (
            self.in_proj_weight.chunk(3)
            if self.in_proj_weight is not None
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            F.linear(x, weight, bias)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]

    def _mask(
        self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """Returns the sum of both masks, broadcastable to (batch, heads, queries, keys)."""
        parts = []
        if mask is not None:
            mask = _additive(mask, q)
            parts.append(mask.unflatten(0, (len(q), -1)) if mask.dim() == 3 else mask)
        if padding is not None:
            parts.append(_additive(padding, q).reshape(len(q), 1, 1, -1))
        if not parts:
            return None
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        added = k.shape[1] - total.shape[-1]  # keys that the module itself adds
        return F.pad(total, (0, added)) if added else total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(
        mask, float("-inf")
    )
