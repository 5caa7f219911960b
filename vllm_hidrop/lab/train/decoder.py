"""A decoder layer, in parts. Axes: B samples, T rows, C hidden size, H query heads, G key/value heads, D head size."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_hidrop.lab.train.rows import Rows

Rotary = tuple[Tensor, Tensor]


class Decoder:
    """Layers of the standard form (norm, attention, norm, MLP): Llama, Mistral, Qwen2; ValueError for another form.

    Linear layers run under the caller's autocast.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.layers: list[Any] = list(self.llm.layers)
        parts = ("q_proj", "k_proj", "v_proj", "o_proj")
        if not all(hasattr(layer.self_attn, part) for layer in self.layers for part in parts):
            raise ValueError(f"{type(llm).__name__} has no separate q, k, v and o projections: cannot train it staged")

    def rotary(self, hidden: Tensor, positions: Tensor) -> Rotary:
        """Cosines and sines of the positions [B, T]."""
        return self.llm.rotary_emb(hidden, positions)

    def project(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H, T, D], key and value [B, G, T, D] of layer ``index``, before RoPE."""
        layer = self.layers[index]
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return query, key, value

    def finish(self, index: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output from its input and its attention [B, H, T, D]."""
        layer = self.layers[index]
        hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return output

    def run(
        self, index: int, hidden: Tensor, rotary: Rotary, presence: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The whole layer, causal over right-padded rows; also its query and key after RoPE."""
        query, key, value = self.project(index, hidden)
        query, key = rotate(query, key, rotary)
        return self.finish(index, hidden, attend(query, key, value, presence)), query, key

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm."""
        normed: Tensor = self.llm.norm(hidden)
        return normed


def rotate(query: Tensor, key: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Query and key with RoPE applied."""
    rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb(query, key, *rotary)
    return rotated


def attend(query: Tensor, key: Tensor, value: Tensor, presence: Tensor | None = None) -> Tensor:
    """Causal attention [B, H, T, D]; it needs no mask, as no valid row of right-padded ones sees padding.

    ``presence`` [B, T] scales a row's terms in the softmax's sums; its logarithm is one more dimension of the keys.
    """
    dtype = value.dtype  # RoPE's tables are float32 where autocast projects in half precision
    query, key = query.to(dtype), key.to(dtype)
    num_groups, size = key.shape[1], key.shape[3]
    if presence is not None:
        one = query.new_full((), size**0.5).expand(*query.shape[:3], 1)
        logarithm = presence.log().to(dtype)[:, None, :, None].expand(-1, num_groups, -1, -1)
        query, key = torch.cat([query, one], -1), torch.cat([key, logarithm], -1)
        value = F.pad(value, (0, 1))
    attended = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=size**-0.5, enable_gqa=query.shape[1] != num_groups
    )
    return attended[..., :size]


def query_attention(query: Tensor, key: Tensor, rows: Rows) -> Tensor:
    """Head-mean attention of the query rows to every row, mean over a sample's query rows, float32 [B, T].

    ``query`` [B, H, T, D], ``key`` [B, G, T, D], both after RoPE. A sample without query rows gets 0 (section 3.3).
    """
    num_queries = rows.is_query.sum(1)
    order = (~rows.is_query).int().argsort(dim=1, stable=True)[:, : max(1, int(num_queries.max()))]
    asked = query.gather(2, order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])).float()
    groups = query.shape[1] // key.shape[1]
    with torch.autocast(query.device.type, enabled=False):  # float32 statistics, as served
        logits = torch.einsum("bghqd,bgtd->bghqt", asked.unflatten(1, (-1, groups)), key.float())
    logits = logits * query.shape[-1] ** -0.5
    columns = torch.arange(key.shape[2], device=key.device)
    is_hidden = columns > order[:, :, None]
    weights = logits.masked_fill(is_hidden[:, None, None], float("-inf")).softmax(-1).mean((1, 2))
    is_asked = rows.is_query.gather(1, order)
    return (weights * is_asked[:, :, None]).sum(1) / num_queries.clamp_min(1)[:, None]
