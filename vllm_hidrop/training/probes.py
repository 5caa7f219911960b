"""Cuts for measuring: hide vision tokens from the deeper layers of a Hugging Face Llama.

The dropped rows are still computed and only masked, so this shows what a cut does to answers,
not what it saves. Axes: B prompts, N rows, V vision tokens, H heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaModel,
    apply_rotary_pos_emb,
)

Selector = Literal["attention", "random", "inverted"]
SELECTORS: tuple[Selector, ...] = ("attention", "random", "inverted")


@dataclass(frozen=True)
class Cut:
    """From layer ``first_layer`` on only ``num_kept`` vision tokens are visible.

    ``attention`` keeps the highest scores, ``inverted`` the lowest, ``random`` any. The score is
    the head-mean attention of the last prompt row under the queries and keys of ``first_layer``.
    """

    first_layer: int
    num_kept: int
    selector: Selector


@dataclass(frozen=True)
class PromptRows:
    """Where things are: vision rows [first, end), and each prompt's last row [B]."""

    first_vision: int
    end_vision: int
    last_prompt: Tensor


def last_row_attention(
    layer: LlamaDecoderLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor], rows: PromptRows
) -> Tensor:
    """Head-mean attention of the last prompt row on the vision rows, [B, V] float32."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    size = attention.head_dim
    query = attention.q_proj(normed).unflatten(-1, (-1, size)).transpose(1, 2)
    key = attention.k_proj(normed).unflatten(-1, (-1, size)).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    prompts = torch.arange(len(hidden))
    last = query[prompts, :, rows.last_prompt].unsqueeze(2)
    logits = (last @ key.transpose(-1, -2)).squeeze(2) / size**0.5
    is_later = torch.arange(hidden.shape[1]) > rows.last_prompt[:, None]
    weights = logits.masked_fill(is_later[:, None], float("-inf")).float().softmax(-1)
    scores: Tensor = weights.mean(1)[:, rows.first_vision : rows.end_vision]
    return scores


def select(scores: Tensor, cut: Cut, seed: int) -> Tensor:
    """Which vision tokens are kept, [B, V] bool."""
    if cut.selector == "random":
        scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
    chosen = scores.topk(cut.num_kept, dim=-1, largest=cut.selector != "inverted").indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, chosen, True)


class _CutHook:
    """Replaces the attention mask of the layers from the cut on."""

    def __init__(self, cut: Cut, rows: PromptRows, seed: int) -> None:
        self.cut, self.rows, self.seed = cut, rows, seed
        self.mask: Tensor | None = None

    def __call__(
        self, layer: LlamaDecoderLayer, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.mask is None:
            scores = last_row_attention(layer, hidden, kwargs["position_embeddings"], self.rows)
            self.mask = self._mask(select(scores, self.cut, self.seed), hidden)
        return args, {**kwargs, "attention_mask": self.mask}

    def _mask(self, kept: Tensor, hidden: Tensor) -> Tensor:
        """Additive causal mask [B, 1, N, N] with the dropped columns closed."""
        num_rows = hidden.shape[1]
        visible = torch.ones(num_rows, num_rows, dtype=torch.bool).tril().repeat(len(hidden), 1, 1)
        visible[:, :, self.rows.first_vision : self.rows.end_vision] &= kept[:, None]
        # A dropped row sees itself: its output is never read, but must be finite.
        visible |= torch.eye(num_rows, dtype=torch.bool)
        closed = torch.full(visible.shape, torch.finfo(hidden.dtype).min, dtype=hidden.dtype)
        return closed.masked_fill_(visible, 0)[:, None]


@contextmanager
def cut_applied(llm: LlamaModel, cut: Cut | None, rows: PromptRows, seed: int) -> Iterator[None]:
    """Within this context a forward pass of ``llm`` is cut; with ``None`` nothing changes."""
    if cut is None:
        yield
        return
    hook = _CutHook(cut, rows, seed)
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in llm.layers[cut.first_layer :]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
