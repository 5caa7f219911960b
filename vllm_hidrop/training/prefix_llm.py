"""A forward pass that computes an image once for many questions, with late-read training.

The arithmetic is that of ``LlamaModel`` on ``prefix + one block`` for every block; only the
work shared between blocks is done once. Axes as in ``batches.py``; H heads of size D / H.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaModel,
    apply_rotary_pos_emb,
)

from vllm_hidrop.training.batches import TextBatch


@dataclass(frozen=True)
class LateRead:
    """In layers below ``first_reading_layer`` text sees the scene ``shift`` places further.

    Vision states never depend on text when the image comes first, so only the keys and values
    that text reads are exchanged; what a model learns is to leave shallow layers unread.
    """

    first_reading_layer: int
    shift: int


def linear(module: nn.Module, inputs: Tensor) -> Tensor:
    """A bias-free projection in bfloat16."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return F.linear(inputs.bfloat16(), weight.bfloat16())


def _norm(module: nn.Module, hidden: Tensor) -> Tensor:
    weight, epsilon = module.weight, module.variance_epsilon
    assert isinstance(weight, Tensor)
    assert isinstance(epsilon, float)
    return F.rms_norm(hidden, (hidden.shape[-1],), weight, epsilon)


def _text_mask(batch: TextBatch, num_prefix: int) -> Tensor:
    """Additive mask [S, 1, T, P + T]: the whole prefix, and earlier tokens of the own block."""
    num_text = batch.ids.shape[1]
    same_block = batch.blocks[:, :, None] == batch.blocks[:, None, :]
    visible = same_block & torch.ones(num_text, num_text, dtype=torch.bool).tril()
    mask = torch.zeros(len(batch.ids), 1, num_text, num_prefix + num_text)
    mask[:, 0, :, num_prefix:].masked_fill_(~visible, torch.finfo(torch.float32).min)
    return mask


def _heads(hidden: Tensor, head_size: int) -> Tensor:
    split: Tensor = hidden.float().unflatten(-1, (-1, head_size))
    return split.transpose(1, 2)


class _Pass:
    """One forward pass: what every layer shares."""

    def __init__(self, llm: LlamaModel, batch: TextBatch, positions: Tensor, late: LateRead | None) -> None:
        self.num_prefix = positions.shape[1] - batch.ids.shape[1]
        self.mask = _text_mask(batch, self.num_prefix)
        self.rotary: tuple[Tensor, Tensor] = llm.rotary_emb(self.mask, positions)
        self.late = late

    def attend(self, layer: LlamaDecoderLayer, index: int, normed: Tensor) -> Tensor:
        """Attention output of all rows before the output projection, [S, P + T, D]."""
        attention = layer.self_attn
        size = attention.head_dim
        query = _heads(linear(attention.q_proj, normed), size)
        key = _heads(linear(attention.k_proj, normed), size)
        value = _heads(linear(attention.v_proj, normed), size)
        query, key = apply_rotary_pos_emb(query, key, *self.rotary)
        prefix = slice(None, self.num_prefix)
        shared = F.scaled_dot_product_attention(
            query[:, :, prefix], key[:, :, prefix], value[:, :, prefix], is_causal=True
        )
        read_key, read_value = self._read(key, index), self._read(value, index)
        text = F.scaled_dot_product_attention(query[:, :, self.num_prefix :], read_key, read_value, attn_mask=self.mask)
        return torch.cat([shared, text], dim=2).transpose(1, 2).flatten(2)

    def _read(self, states: Tensor, index: int) -> Tensor:
        """Keys or values as text sees them in layer ``index``."""
        if self.late is None or index >= self.late.first_reading_layer:
            return states
        rolled = states[:, :, : self.num_prefix].roll(self.late.shift, 0)
        return torch.cat([rolled, states[:, :, self.num_prefix :]], dim=2)


def _feed_forward(layer: LlamaDecoderLayer, hidden: Tensor) -> Tensor:
    normed = _norm(layer.post_attention_layernorm, hidden)
    mlp = layer.mlp
    gated = F.silu(linear(mlp.gate_proj, normed)) * linear(mlp.up_proj, normed)
    return hidden + linear(mlp.down_proj, gated).float()


def answer_states(
    llm: LlamaModel,
    prefix: Tensor,
    prefix_positions: Tensor,
    text_start: int,
    batch: TextBatch,
    late: LateRead | None = None,
) -> Tensor:
    """Final states of the text rows, [S, T, D].

    Args:
        llm: The decoder whose weights are used.
        prefix: Input embeddings of the shared prefix, [S, P, D].
        prefix_positions: Their positions, [S, P], ascending.
        text_start: Position of every block's first token.
        batch: The packed questions.
        late: Late-read training, or ``None`` for the plain model.
    """
    positions = torch.cat([prefix_positions, batch.offsets + text_start], dim=1)
    hidden = torch.cat([prefix, llm.embed_tokens(batch.ids)], dim=1)
    shared = _Pass(llm, batch, positions, late)
    for index, layer in enumerate(llm.layers):
        attended = shared.attend(layer, index, _norm(layer.input_layernorm, hidden))
        if index == len(llm.layers) - 1:
            hidden, attended = (part[:, shared.num_prefix :] for part in (hidden, attended))
        hidden = hidden + linear(layer.self_attn.o_proj, attended).float()
        hidden = _feed_forward(layer, hidden)
    return _norm(llm.norm, hidden)
