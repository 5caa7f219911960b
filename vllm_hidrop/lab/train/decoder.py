"""A decoder layer, in parts. Axes: N packed rows, C hidden size, H query heads, G key/value heads, D head size."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_hidrop.lab.train.packed_attention import PYTORCH, Backend, packed_attention
from vllm_hidrop.lab.train.rows import Rows

Rotary = tuple[Tensor, Tensor]


class Decoder:
    """Layers of the standard form (norm, attention, norm, MLP): Llama, Mistral, Qwen2; ValueError for another form.

    Linear layers run under the caller's autocast. ``gradient_checkpointing`` recomputes layers in the backward pass.
    """

    def __init__(self, llm: Any, attention: Backend = PYTORCH, gradient_checkpointing: bool = False) -> None:
        self.llm = llm
        self.layers: list[Any] = list(self.llm.layers)
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        parts = ("q_proj", "k_proj", "v_proj", "o_proj")
        if not all(hasattr(layer.self_attn, part) for layer in self.layers for part in parts):
            raise ValueError(f"{type(llm).__name__} has no separate q, k, v and o projections: cannot train it staged")

    def rotary(self, hidden: Tensor, positions: Tensor) -> Rotary:
        """Cosines and sines [N, D] of the positions [N]."""
        cosines, sines = self.llm.rotary_emb(hidden[None], positions[None])
        return cosines[0], sines[0]

    def project(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [N, H, D], key and value [N, G, D] of layer ``index``, before RoPE."""
        layer = self.layers[index]
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return query, key, value

    def attend(
        self,
        index: int,
        hidden: Tensor,
        projected: tuple[Tensor, Tensor, Tensor],
        row_starts: Tensor,
        presence: Tensor | None,
    ) -> Tensor:
        """The layer's output [N, C] from its input and its query and key after RoPE, and value."""
        layer = self.layers[index]
        attended = packed_attention(*projected, row_starts, presence, self.attention)
        hidden = hidden + layer.self_attn.o_proj(attended.flatten(1))
        output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return output

    def run(
        self, index: int, hidden: Tensor, rotary: Rotary, row_starts: Tensor, presence: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The whole layer; also its query and key after RoPE."""
        arguments = index, hidden, rotary, row_starts, presence
        if self.gradient_checkpointing and torch.is_grad_enabled():
            result: tuple[Tensor, Tensor, Tensor] = checkpoint(self._run, *arguments, use_reentrant=False)
            return result
        return self._run(*arguments)

    def _run(
        self, index: int, hidden: Tensor, rotary: Rotary, row_starts: Tensor, presence: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.project(index, hidden)
        query, key = rotate(query, key, rotary)
        return self.attend(index, hidden, (query, key, value), row_starts, presence), query, key

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm."""
        normed: Tensor = self.llm.norm(hidden)
        return normed


def rotate(query: Tensor, key: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Query [N, H, D] and key [N, G, D] with RoPE applied."""
    rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb(query, key, *rotary, unsqueeze_dim=1)
    return rotated


def query_attention(query: Tensor, key: Tensor, rows: Rows) -> Tensor:
    """Head-mean attention of a sample's query rows to its rows, mean over the query rows, float32 [N].

    ``query`` [N, H, D], ``key`` [N, G, D], both after RoPE. A sample without query rows gets 0 (section 3.3).
    """
    samples = zip(*(part.split(rows.lengths) for part in (query, key, rows.is_query)), strict=True)
    with torch.autocast(query.device.type, enabled=False):  # float32 statistics, as served
        return torch.cat([_mean_attention(*sample) for sample in samples])


def _mean_attention(query: Tensor, key: Tensor, is_query: Tensor) -> Tensor:
    """:func:`query_attention` of one sample."""
    asked = is_query.nonzero().flatten()
    groups = query.shape[1] // key.shape[1]
    heads = query[asked].float().unflatten(1, (-1, groups))
    logits = torch.einsum("qghd,tgd->ghqt", heads, key.float()) * query.shape[2] ** -0.5
    is_hidden = torch.arange(len(key), device=key.device) > asked[:, None]
    weights = logits.masked_fill(is_hidden, float("-inf")).softmax(-1).mean((0, 1))
    return weights.sum(0) / max(1, len(asked))
