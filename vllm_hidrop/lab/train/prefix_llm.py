"""A staged forward pass that computes an image once for many questions, with late-read training.

The arithmetic is ``LlamaModel``'s on ``prefix + one block`` for every block; only the work that blocks share is done
once. Axes as in ``batches.py``; H heads of size D / H; B blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaModel,
    apply_rotary_pos_emb,
)

from vllm_hidrop.lab.train.batches import IGNORED, TextBatch
from vllm_hidrop.lab.train.rows import Rows, State, all_rows, packed_starts
from vllm_hidrop.lab.train.staged import StagedTraining
from vllm_hidrop.plan.positions import PositionScheme


@dataclass(frozen=True)
class LateRead:
    """In layers below ``first_reading_layer`` text sees another scene's image, ``shift`` places away in the batch.

    Vision states never depend on text when the image comes first, so only the keys and values that text reads are
    exchanged; what a model learns is to leave shallow layers unread.
    """

    first_reading_layer: int
    shift: int


@dataclass(frozen=True)
class Prefix:
    """What a scene's questions share: embeddings [S, P, D] of text, then of vision tokens, and positions [S, P].

    ``num_before`` rows are text; a block's first token stands at position ``text_start``.
    """

    embeddings: Tensor
    positions: Tensor
    num_before: int
    text_start: int


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
    """Additive mask [S, 1, T, P + T] that shows a row the whole prefix and earlier tokens of its own block."""
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
    """One forward pass: the mask and RoPE tables that its layers share."""

    def __init__(self, llm: LlamaModel, batch: TextBatch, positions: Tensor, late: LateRead | None) -> None:
        self.num_prefix = positions.shape[1] - batch.ids.shape[1]
        self.mask = _text_mask(batch, self.num_prefix)
        self.rotary: tuple[Tensor, Tensor] = llm.rotary_emb(self.mask, positions)
        self.late = late
        self.llm: Any = llm

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Layer ``index`` on all rows, [S, P + T, D]."""
        layer = self.llm.layers[index]
        attended = self.attend(layer, index, _norm(layer.input_layernorm, hidden))
        hidden = hidden + linear(layer.self_attn.o_proj, attended).float()
        return _feed_forward(layer, hidden)

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


class SharedImage:
    """Final states of questions about shared images, under the schedule of ``staged``.

    Up to the first cut the image's rows are computed once for all questions of a scene; at the cut every question
    chooses its own survivors and is a sequence of its own from there on.
    """

    def __init__(self, staged: StagedTraining) -> None:
        self.staged = staged
        self.llm: Any = staged.llm

    def __call__(self, prefix: Prefix, batch: TextBatch, late: LateRead | None = None) -> Tensor:
        """Final states of the text rows, [S, T, D]; ``late`` is late-read training, None for the plain model."""
        hidden = torch.cat([prefix.embeddings, self.llm.embed_tokens(batch.ids)], dim=1)
        positions = torch.cat([prefix.positions, batch.offsets + prefix.text_start], dim=1)
        shared = _Pass(self.llm, batch, positions, late)
        is_text = torch.ones(hidden.shape[1], dtype=torch.bool)
        is_text[prefix.num_before : shared.num_prefix] = False
        blind = _Pass(self.llm, batch, self._text_positions(positions[:, is_text], prefix), None)
        schedule = self.staged.schedule
        sees, text_only = True, hidden[:, :0]
        for index, stage in enumerate(schedule.stages):
            if self.staged.selects(index):
                return self._fork(index, hidden, positions, prefix, batch)
            if stage.keep.is_none and sees:
                hidden, text_only, sees = hidden[:, is_text], hidden, False
            elif not stage.keep.is_none and not sees:
                parts = hidden[:, : prefix.num_before], text_only[:, ~is_text], hidden[:, prefix.num_before :]
                hidden, sees = torch.cat(parts, 1), True
            for layer in range(stage.first_layer, schedule.end_layers[index]):
                hidden = (shared if sees else blind).run(layer, hidden)
        return _norm(self.llm.norm, hidden[:, -batch.ids.shape[1] :])

    def _text_positions(self, positions: Tensor, prefix: Prefix) -> Tensor:
        """Positions of the text rows in layers without vision."""
        if self.staged.position_scheme is not PositionScheme.RENUMBERED:
            return positions
        num_vision = prefix.embeddings.shape[1] - prefix.num_before
        return torch.cat([positions[:, : prefix.num_before], positions[:, prefix.num_before :] - num_vision], 1)

    def _fork(self, stage: int, hidden: Tensor, positions: Tensor, prefix: Prefix, batch: TextBatch) -> Tensor:
        staged = self.staged
        fork = _Fork(batch, prefix)
        index, keep = staged.schedule.stages[stage].first_layer, staged.schedule.stages[stage].keep
        with torch.autocast("cpu", dtype=torch.bfloat16):
            query, key, value = (fork.take(part.float()) for part in staged.decoder.project(index, hidden))
            rows = fork.rows(positions)
            state = staged.cut_projected(index, all_rows(fork.take(hidden), rows), (query, key, value), keep, rows)
            state, _ = staged.run_layers(index + 1, staged.schedule.end_layers[stage], state)
            state = staged.run_stages(stage + 1, state, state.hidden, rows)
        return _norm(self.llm.norm, fork.text_states(state))


class _Fork:
    """From S scenes with packed blocks to one packed sample per block: [S, P + T] to [N], its samples P + T' rows."""

    def __init__(self, batch: TextBatch, prefix: Prefix) -> None:
        self.batch, self.num_before, self.num_prefix = batch, prefix.num_before, prefix.embeddings.shape[1]
        num_blocks = int(batch.blocks.max()) + 1
        is_mine = batch.blocks[:, None] == torch.arange(num_blocks)[:, None]  # [S, blocks, T]
        has_prefix = is_mine.any(-1, keepdim=True).expand(-1, -1, self.num_prefix)
        is_row = torch.cat([has_prefix, is_mine], -1)
        self.scene, _, self.column = is_row.nonzero(as_tuple=True)
        lengths = is_row.sum(-1).flatten()
        self.row_starts = packed_starts(lengths[lengths > 0].tolist())

    def take(self, shared: Tensor) -> Tensor:
        """[N, ...] from [S, P + T, ...]."""
        return shared[self.scene, self.column]

    def rows(self, positions: Tensor) -> Rows:
        """The rows of every block's sample."""
        is_image = (self.column >= self.num_before) & (self.column < self.num_prefix)
        images = torch.where(is_image, 0, -1)
        nothing = self.batch.targets.new_full((len(self.batch.targets), self.num_prefix), IGNORED)
        is_asked = self.take(torch.cat([nothing, self.batch.targets], 1)) != IGNORED
        is_query = is_asked & ~is_asked.roll(1)  # a sample's first row is never asked for
        return Rows(self.take(positions), images, is_query, self.row_starts)

    def text_states(self, state: State) -> Tensor:
        """The text rows back in their packed places, [S, T, D]."""
        scene, column = self.scene[state.places], self.column[state.places] - self.num_prefix
        is_text = column >= 0
        shared = state.hidden.new_zeros(*self.batch.ids.shape, state.hidden.shape[-1])
        return shared.index_put((scene[is_text], column[is_text]), state.hidden[is_text])
