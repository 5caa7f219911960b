"""The vision tower of MustDrop's reference: windows of similar patches merge, the class token names key patches.

Dense over all patches of one image: a merged window leaves its mean in the row of its bottom-right patch; the other
rows are computed on, but nobody sees them. Axes as in ``mustdrop``.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_hidrop.verify.reference.attention import Heads, Kept, attention_weights, top_indices
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings


class Merged(NamedTuple):
    """Patch rows [V, C] with the means in place, the patches left, the merged windows, the nearest to the threshold."""

    patches: torch.Tensor
    alive: list[int]
    windows: Kept
    margin: float


class KeySet(NamedTuple):
    """The chosen patches, ascending, and by how much the last of them beat the first other one."""

    patches: list[int]
    margin: float


@dataclass(frozen=True)
class EncodedImage:
    """Projector output [V, C] of one image; rows of patches that merged away mean nothing.

    ``windows``: the patches of each window that merged, ascending.
    """

    features: torch.Tensor
    alive: list[int]
    keys: list[int]
    margins: dict[str, float]
    windows: Kept


def window_patches(side: int, window: int) -> Kept:
    """The patches of each window of a ``side`` x ``side`` grid, ascending: the bottom-right one is the last."""
    starts = range(0, side, window)
    return [
        [(top + row) * side + left + column for row in range(window) for column in range(window)]
        for top in starts
        for left in starts
    ]


def similarity(rows: torch.Tensor) -> torch.Tensor:
    """Mean cosine over all ordered pairs of two different rows of [M, C], a scalar."""
    unit = torch.nn.functional.normalize(rows, dim=-1)
    cosines = unit @ unit.T
    return (cosines.sum() - cosines.trace()) / (len(rows) * (len(rows) - 1))


def merge_windows(patches: torch.Tensor, threshold: float, window: int) -> Merged:
    """Merge the windows of [V, C] whose similarity is at least ``threshold``."""
    side = math.isqrt(len(patches))
    if side**2 != len(patches) or window < 2 or side % window:
        raise ValueError(f"windows of {window} x {window} must divide a square grid of {len(patches)} patches")
    result, merged, distances = patches.clone(), [], []
    for members in window_patches(side, window):
        score = similarity(patches[members])
        distances.append((score - threshold).abs())
        if score >= threshold:
            result[members[-1]] = patches[members].mean(dim=0)
            merged.append(members)
    gone = {patch for members in merged for patch in members[:-1]}
    alive = [patch for patch in range(len(patches)) if patch not in gone]
    return Merged(result, alive, merged, smallest(torch.stack(distances)))


def key_set(scores: torch.Tensor, alive: list[int], key_rate: float) -> KeySet:
    """The patches with the highest of [V] ``scores`` among those ``alive``; of equal ones the lowest."""
    ranks = top_indices(scores[alive], math.ceil(key_rate * len(alive)))
    chosen = [alive[rank] for rank in ranks]
    others = [patch for patch in alive if patch not in chosen]
    margin = float(scores[chosen].min() - scores[others].max()) if chosen and others else math.inf
    return KeySet(chosen, margin)


def smallest(distances: torch.Tensor) -> float:
    """The smallest of [M] distances: infinite if there is none, 0 if one is NaN."""
    return float(distances.nan_to_num(nan=0.0, posinf=math.inf).min()) if len(distances) else math.inf


class Tower:
    """CLIP or SigLIP with the projector behind it, one image at a time, dense over all its patches."""

    def __init__(self, model: Any) -> None:
        self._tower = model.model.vision_tower
        self._projector = model.model.multi_modal_projector
        self._layers: list[Any] = list(self._tower.encoder.layers)
        self._num_class_tokens = int(hasattr(self._tower.embeddings, "class_embedding"))
        self._feature_layer = self._check(model.config)

    def encode(self, pixels: torch.Tensor, settings: MustDropSettings) -> EncodedImage:
        """Features and decisions for one image, ``pixels`` [channels, height, width]."""
        if settings.key_rate and not self._num_class_tokens:
            raise ValueError("a key set needs a tower with a class token")
        hidden = self._embed(pixels)
        num_class = self._num_class_tokens
        alive, merge_margin = list(range(len(hidden) - num_class)), math.inf
        windows: Kept = []
        visible = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        entering = [hidden]
        for index, layer in enumerate(self._layers):
            hidden = run_tower_layer(layer, hidden, visible)
            if index == 0 and settings.merge_threshold is not None:
                merged = merge_windows(hidden[num_class:], settings.merge_threshold, settings.merge_window)
                hidden = torch.cat([hidden[:num_class], merged.patches])
                visible[num_class:] = False
                visible[[num_class + patch for patch in merged.alive]] = True
                alive, windows, merge_margin = merged.alive, merged.windows, merged.margin
            entering.append(hidden)
        keys = KeySet([], math.inf)
        if settings.key_rate:
            index = len(self._layers) - 1 if settings.key_layer == "last" else self._feature_layer
            keys = key_set(_class_attention(self._layers[index], entering[index], visible), alive, settings.key_rate)
        features = self._projector(entering[self._feature_layer + 1][num_class:])
        margins = {"merge": merge_margin, "key": keys.margin}
        return EncodedImage(features, alive, keys.patches, margins, windows)

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """[T, C] entering the first layer; CLIP alone has a norm there (and its name a typo)."""
        hidden: torch.Tensor = self._tower.embeddings(pixels[None])[0]
        return self._tower.pre_layrnorm(hidden) if hasattr(self._tower, "pre_layrnorm") else hidden

    def _check(self, config: Any) -> int:
        """The index of the layer whose output the projector takes; ValueError for what has no meaning here."""
        selected, num_layers = config.vision_feature_layer, len(self._layers)
        if not isinstance(selected, int):
            raise ValueError(f"the features must come from one layer, got {selected}")
        index = selected - 1 if selected >= 0 else num_layers + selected
        if not 1 <= index < num_layers:
            raise ValueError(f"the features must come from a layer after the first, got {selected}")
        strategy = config.vision_feature_select_strategy
        if strategy != ("default" if self._num_class_tokens else "full"):
            raise ValueError(f"the features must be those of all patches alone, got strategy {strategy!r}")
        return index


def _project_tower_heads(layer: Any, hidden: torch.Tensor) -> Heads:
    """What a tower layer makes of [T, C]: input norm and projections, no RoPE."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    heads = [projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1) for projection in projections]
    return Heads(*heads)


def _hide(visible: torch.Tensor) -> torch.Tensor:
    """[1, T] additive mask, 0 or -inf, for rows that all see the ``visible`` [T] columns."""
    return torch.zeros(1, len(visible), device=visible.device).masked_fill(~visible, -torch.inf)


def run_tower_layer(layer: Any, hidden: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """One encoder layer on [T, C]; all rows see the ``visible`` [T] columns."""
    heads = _project_tower_heads(layer, hidden)
    weights = attention_weights(heads.query, heads.key, _hide(visible))
    hidden = hidden + layer.self_attn.out_proj((weights.to(hidden.dtype) @ heads.value).transpose(0, 1).flatten(1))
    update: torch.Tensor = layer.mlp(layer.layer_norm2(hidden))
    return hidden + update


def _class_attention(layer: Any, hidden: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """[V]: what the class token pays to each patch in ``layer`` on the [T, C] that enter it, mean over heads."""
    heads = _project_tower_heads(layer, hidden)
    return attention_weights(heads.query[:, :1], heads.key, _hide(visible)).mean(dim=0)[0, 1:]
