"""Encoder selection: a CLIP tower whose later layers run fewer rows, for methods that merge patches there."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_hidrop.methods.adaptive import EncoderReduction, KeyLayer
from vllm_hidrop.staged.merging import Reduced, ReducedTile, key_rows, merge, packed
from vllm_hidrop.staged.tensor_parallel import first_ranks

Weights = Iterable[tuple[str, torch.Tensor]]


class ClassAttention(nn.Module):
    """The norm and the Q and K projections of one encoder layer, which give its class row's attention."""

    def __init__(self, vision_config: Any, layer: int) -> None:
        super().__init__()
        size = vision_config.hidden_size
        self.layer_norm1 = nn.LayerNorm(size, eps=vision_config.layer_norm_eps)
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.num_heads = vision_config.num_attention_heads
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Attention of the class row, the first of ``hidden`` [T, C], to the other rows: float32 [T - 1], head mean."""
        normed = self.layer_norm1(hidden)
        query = self.q_proj(normed[0]).float().view(self.num_heads, -1, 1)
        key = self.k_proj(normed).float().view(len(hidden), self.num_heads, -1).transpose(0, 1)
        logits = (key @ query)[..., 0] * query.shape[1] ** -0.5
        return logits.softmax(dim=-1).mean(0)[1:]

    def load(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Copy this layer's weights out of a checkpoint's; all weights are handed on."""
        ours = re.compile(rf"vision_tower\..*encoder\.layers\.{self.layer}\.(?:self_attn\.)?(\w+\.(?:weight|bias))$")
        missing = dict(self.named_parameters())
        for name, weight in weights:
            match = ours.search(name)
            if match and match[1] in missing:
                missing.pop(match[1]).data.copy_(weight)
            yield name, weight
        if missing:
            raise ValueError(
                f"this checkpoint has no layer {self.layer} of the vision tower, by whose class attention mustdrop "
                'ranks key tokens: set "key_layer": "feature"'
            )


class ReducingTower:
    """Encodes images one by one; the layers after the first run the rows that a reduction leaves.

    ``tower`` is vLLM's CLIP vision transformer, up to the layer whose output are the features.
    """

    def __init__(self, tower: Any, reduction: EncoderReduction, class_attention: ClassAttention) -> None:
        self.tower = tower
        self.reduction = reduction
        self.class_attention = class_attention
        self.found: list[Reduced | None] | None = None
        """Of the images encoded since :meth:`reducing` was entered, which patches are left; None outside of it."""

    @contextmanager
    def reducing(self) -> Iterator[list[Reduced | None]]:
        """Reduce images until exit; yields the list to which every encoded image adds its outcome."""
        self.found = []
        try:
            yield self.found
        finally:
            self.found = None

    def encode(self, pixels: torch.Tensor, projector: nn.Module) -> torch.Tensor:
        """Projected features [V, C] of one image [channels, height, width]; a merged patch has its window's."""
        assert self.found is not None
        features, tile = self._encode(pixels, projector)
        self.found.append(tile.reduced)
        return features

    def encode_tiles(
        self, pixels: torch.Tensor, projector: nn.Module, places: np.ndarray[Any, np.dtype[np.int64]]
    ) -> torch.Tensor:
        """Projected features [tiles, V, C] of one image's ``pixels`` [tiles, channels, height, width].

        ``places`` are int64 [tokens], the patches that the image's tokens will be, see ``merging.packed``.
        """
        assert self.found is not None
        encoded = [self._encode(of_tile, projector) for of_tile in pixels]
        self.found.append(packed([tile for _, tile in encoded], places))
        return torch.stack([features for features, _ in encoded])

    def _encode(self, pixels: torch.Tensor, projector: nn.Module) -> tuple[torch.Tensor, ReducedTile]:
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixels[None]))
        first, *layers = self.tower.encoder.layers
        hidden = first_ranks(first(hidden))
        merged = merge(hidden[0, 1:], self.reduction.merge_threshold, self.reduction.merge_window)
        hidden = torch.cat((hidden[:, :1], merged.rows[None]), dim=1)
        entering = hidden
        for layer in layers:
            entering, hidden = hidden, layer(hidden)
        ranks = entering if self.reduction.key_layer is KeyLayer.FEATURE else hidden
        reduced = Reduced(merged.alive, self._keys(ranks[0], merged.alive), merged.merged_first)
        row_of = torch.from_numpy(merged.row_of).to(hidden.device)
        projected: torch.Tensor = projector(hidden[:, 1:])[0]
        return projected[row_of], ReducedTile(reduced, merged.row_of)

    def _keys(self, hidden: torch.Tensor, alive: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, Any]:
        is_key = np.zeros_like(alive)
        chosen = key_rows(self.class_attention(first_ranks(hidden)), self.reduction.key_rate).cpu().numpy()
        is_key[np.flatnonzero(alive)[chosen]] = True
        return is_key
