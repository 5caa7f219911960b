"""Dense float32 reference for MustDrop; merging, filtering and cutting the cache are attention masks here.

Knows Hugging Face modules only: nothing of the engine, of vLLM, of caches, batches or method names.

Vision tower: a merged window leaves its mean in the row of its bottom-right patch; the other rows are
computed on, but nobody sees them. Language model: every layer runs ALL rows of the full grid, at the
positions 0, 1, 2, ... of the full prompt; who sees which vision column is all that changes. No row is
gathered or moved. For every generated token the whole sequence is computed again; what was decided for
the prompt stays.

Axes: P prompt rows, T rows of one pass (P + tokens generated so far, or the class token + V in the tower),
V patches of one image, N surviving vision tokens of one image, R text rows that judge an image, H heads,
D head size, C hidden size.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from transformers import LlavaForConditionalGeneration

from tests.oracles.llama import (
    Heads,
    Kept,
    Rope,
    additive_mask,
    attention_weights,
    project_heads,
    run_layer,
    top_indices,
)

KeyLayer = Literal["last", "feature"]
MARGINS = ("merge", "key", "global", "individual")


@dataclass(frozen=True)
class MustDropSettings:
    """The three stages of MustDrop; layers are zero-based.

    * ``global_threshold`` (gamma), ``individual_threshold`` (alpha): a vision token goes if its share of the
      attention of the text is below gamma AND no text row pays it alpha AND it is no key token.
    * ``filter_layers``: ascending; the attention of layer F judges, the survivors run from layer F + 1.
    * ``merge_threshold``: windows of ``merge_window`` x ``merge_window`` patches at least this similar merge;
      None merges nothing.
    * ``key_rate``: the share of the tokens after merging that are key tokens, rounded up; 0 for none.
    * ``key_layer``: whose class token chooses them, the tower's last layer or the last one behind the features.
    * ``cut_cache``: from the first filter layer on, generated tokens see only the survivors of the last filter.
    """

    global_threshold: float
    individual_threshold: float
    filter_layers: tuple[int, ...]
    merge_threshold: float | None = 0.8
    merge_window: int = 3
    key_rate: float = 0.08
    key_layer: KeyLayer = "last"
    cut_cache: bool = True


@dataclass(frozen=True)
class MustDropResult:
    """What one request produced; ``logits`` are float32 and on the CPU.

    * ``token_ids``: greedy tokens, a stop id included.
    * ``logits``: [generated, vocabulary], the logits that chose each token.
    * ``alive``: per image the patches that exist after merging, ascending; a merged window is its bottom-right one.
    * ``keys``: per image the patches of the key set, ascending.
    * ``kept``: per layer of the language model and per image the vision tokens when that layer runs the prompt.
    * ``margins``: how near the nearest decision was to falling otherwise, infinite where none was made. "merge":
      |similarity - threshold|; "key": score of the last key token - score of the first other one; "global":
      |g - gamma G| / G and "individual": |m - alpha|, both over the tokens that are not key tokens.
    """

    token_ids: list[int]
    logits: torch.Tensor
    alive: Kept
    keys: Kept
    kept: list[Kept]
    margins: dict[str, float]


class Merged(NamedTuple):
    """Patch rows [V, C] with the means in place, the patches that are left, the smallest distance to the threshold."""

    patches: torch.Tensor
    alive: list[int]
    margin: float


class KeySet(NamedTuple):
    """The chosen patches, ascending, and by how much the last of them beat the first other one."""

    patches: list[int]
    margin: float


class Verdict(NamedTuple):
    """``goes`` [N] (bool) and the smallest distances of the two tests to their thresholds."""

    goes: torch.Tensor
    global_margin: float
    individual_margin: float


@dataclass(frozen=True)
class _Image:
    """Projector output [V, C] of one image; rows of patches that merged away mean nothing."""

    features: torch.Tensor
    alive: list[int]
    keys: list[int]
    margins: dict[str, float]


@dataclass(frozen=True)
class _Prompt:
    """``rows`` [P, C] enter layer 0; per image its rows [V] in the prompt and the text rows [R] after it."""

    rows: torch.Tensor
    images: list[_Image]
    image_rows: list[torch.Tensor]
    judging_rows: list[torch.Tensor]


class _Prefill(NamedTuple):
    """``logits`` [vocabulary] of the last row, ``kept`` per layer, ``survivors`` of the last filter, margins."""

    logits: torch.Tensor
    kept: list[Kept]
    survivors: Kept
    margins: dict[str, float]


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
    result, gone, distances = patches.clone(), set[int](), []
    for members in window_patches(side, window):
        score = similarity(patches[members])
        distances.append((score - threshold).abs())
        if score >= threshold:
            result[members[-1]] = patches[members].mean(dim=0)
            gone.update(members[:-1])
    alive = [patch for patch in range(len(patches)) if patch not in gone]
    return Merged(result, alive, smallest(torch.stack(distances)))


def key_set(scores: torch.Tensor, alive: list[int], key_rate: float) -> KeySet:
    """The patches with the highest of [V] ``scores`` among those ``alive``; of equal ones the lowest."""
    ranks = top_indices(scores[alive], math.ceil(key_rate * len(alive)))
    chosen = [alive[rank] for rank in ranks]
    others = [patch for patch in alive if patch not in chosen]
    margin = float(scores[chosen].min() - scores[others].max()) if chosen and others else math.inf
    return KeySet(chosen, margin)


def dual_filter(attention: torch.Tensor, is_key: torch.Tensor, gamma: float, alpha: float) -> Verdict:
    """Judge vision tokens by ``attention`` [R, N], the head mean of what the text pays; ``is_key`` is [N].

    A comparison with NaN is false, so such a token stays.
    """
    of_token = attention.sum(dim=0)
    total = of_token.sum()
    strongest = attention.amax(dim=0)
    goes = (of_token < gamma * total) & (strongest < alpha) & ~is_key
    return Verdict(
        goes,
        smallest(((of_token - gamma * total) / total).abs()[~is_key]),
        smallest((strongest - alpha).abs()[~is_key]),
    )


def smallest(distances: torch.Tensor) -> float:
    """The smallest of [M] distances: infinite if there is none, 0 if one is NaN."""
    return float(distances.nan_to_num(nan=0.0, posinf=math.inf).min()) if len(distances) else math.inf


def visible_columns(prompt: _Prompt, kept: Kept, num_rows: int) -> torch.Tensor:
    """[T]: all text and generated tokens, and the ``kept`` vision tokens."""
    visible = torch.ones(num_rows, dtype=torch.bool, device=prompt.rows.device)
    for rows, survivors in zip(prompt.image_rows, kept, strict=True):
        visible[rows] = False
        visible[rows[survivors]] = True
    return visible


def check_settings(settings: MustDropSettings, num_layers: int) -> None:
    """Raise ValueError for settings that mean nothing in a language model of ``num_layers``."""
    layers = settings.filter_layers
    if any(not 0 <= layer < num_layers for layer in layers) or any(a >= b for a, b in pairwise(layers)):
        raise ValueError(f"filter layers must rise inside [0, {num_layers}), got {layers}")
    if not 0 <= settings.key_rate <= 1:
        raise ValueError(f"key rate must be in [0, 1], got {settings.key_rate}")
    if settings.key_layer not in get_args(KeyLayer):
        raise ValueError(f"unknown key layer {settings.key_layer!r}, known: {get_args(KeyLayer)}")


class _Tower:
    """CLIP or SigLIP with the projector behind it, one image at a time, dense over all its patches."""

    def __init__(self, model: Any) -> None:
        self._tower = model.model.vision_tower
        self._projector = model.model.multi_modal_projector
        self._layers: list[Any] = list(self._tower.encoder.layers)
        self._num_class_tokens = int(hasattr(self._tower.embeddings, "class_embedding"))
        self._feature_layer = self._check(model.config)

    def encode(self, pixels: torch.Tensor, settings: MustDropSettings) -> _Image:
        """Features and decisions for one image, ``pixels`` [channels, height, width]."""
        if settings.key_rate and not self._num_class_tokens:
            raise ValueError("a key set needs a tower with a class token")
        hidden = self._embed(pixels)
        num_class = self._num_class_tokens
        alive, merge_margin = list(range(len(hidden) - num_class)), math.inf
        visible = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        entering = [hidden]
        for index, layer in enumerate(self._layers):
            hidden = _run_tower_layer(layer, hidden, visible)
            if index == 0 and settings.merge_threshold is not None:
                merged = merge_windows(hidden[num_class:], settings.merge_threshold, settings.merge_window)
                hidden = torch.cat([hidden[:num_class], merged.patches])
                visible[num_class:] = False
                visible[[num_class + patch for patch in merged.alive]] = True
                alive, merge_margin = merged.alive, merged.margin
            entering.append(hidden)
        keys = KeySet([], math.inf)
        if settings.key_rate:
            index = len(self._layers) - 1 if settings.key_layer == "last" else self._feature_layer
            keys = key_set(_class_attention(self._layers[index], entering[index], visible), alive, settings.key_rate)
        features = self._projector(entering[self._feature_layer + 1][num_class:])
        return _Image(features, alive, keys.patches, {"merge": merge_margin, "key": keys.margin})

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


def _run_tower_layer(layer: Any, hidden: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """One encoder layer on [T, C]; all rows see the ``visible`` [T] columns."""
    heads = _project_tower_heads(layer, hidden)
    weights = attention_weights(heads.query, heads.key, _hide(visible))
    hidden = hidden + layer.self_attn.out_proj((weights @ heads.value).transpose(0, 1).flatten(1))
    update: torch.Tensor = layer.mlp(layer.layer_norm2(hidden))
    return hidden + update


def _class_attention(layer: Any, hidden: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """[V]: what the class token pays to each patch in ``layer`` on the [T, C] that enter it, mean over heads."""
    heads = _project_tower_heads(layer, hidden)
    return attention_weights(heads.query[:, :1], heads.key, _hide(visible)).mean(dim=0)[0, 1:]


class MustDropOracle:
    """Greedy generation of one LLaVA request under MustDrop, every image on its own.

    Text models: Llama, Mistral, Qwen2 (RMSNorm, GQA, optional biases; no sliding window). Towers: CLIP, and
    SigLIP without a key set. A model that is passed in must be float32; it is put into eval mode.
    """

    def __init__(self, model: str | Path | LlavaForConditionalGeneration) -> None:
        if isinstance(model, str | Path):
            model = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
        if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
            raise ValueError("the oracle computes in float32, got a model in another dtype")
        self._model: Any = model.eval()
        self._text: Any = self._model.model.language_model
        self._layers: list[Any] = list(self._text.layers)
        self._tower = _Tower(self._model)

    @torch.no_grad()
    def generate(
        self,
        token_ids: list[int],
        pixel_values: torch.Tensor | None,
        settings: MustDropSettings,
        max_tokens: int,
        stop_ids: Collection[int] = (),
    ) -> MustDropResult:
        """Generate at most ``max_tokens`` (>= 1) tokens, ending with the first of ``stop_ids``.

        ``token_ids`` [P] hold the image token once per patch of the full grid and end with text;
        ``pixel_values`` is [images, channels, height, width], or None for text. Raises ValueError for input
        that has no defined meaning.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self._check_window(len(token_ids) + max_tokens)
        check_settings(settings, len(self._layers))
        prompt = self._prepare(token_ids, pixel_values, settings)
        prefill = self._prefill(prompt, settings)
        cached = prefill.kept
        if settings.cut_cache and settings.filter_layers:
            first = settings.filter_layers[0]
            cached = [*cached[:first], *[prefill.survivors] * (len(cached) - first)]

        generated: list[int] = []
        logits = [prefill.logits]
        while True:
            generated.append(int(logits[-1].argmax()))
            if len(generated) == max_tokens or generated[-1] in stop_ids:
                break
            logits.append(self._extend(prompt, generated, prefill.kept, cached))
        return MustDropResult(
            token_ids=generated,
            logits=torch.stack(logits).cpu(),
            alive=[image.alive for image in prompt.images],
            keys=[image.keys for image in prompt.images],
            kept=prefill.kept,
            margins=_nearest([prefill.margins, *(image.margins for image in prompt.images)]),
        )

    def _check_window(self, num_rows: int) -> None:
        window = getattr(self._text.config, "sliding_window", None)
        if window is not None and window < num_rows:
            raise ValueError(f"{num_rows} rows exceed the sliding window of {window}")

    def _prepare(self, token_ids: list[int], pixel_values: torch.Tensor | None, settings: MustDropSettings) -> _Prompt:
        """Embed the text and put the projector rows at the image tokens, image after image."""
        tokens = torch.tensor(token_ids, device=self._model.device)
        is_image = tokens == self._model.config.image_token_id
        if not token_ids or is_image[-1]:
            raise ValueError("the prompt must end with text")
        pixels = () if pixel_values is None else pixel_values.to(tokens.device, torch.float32)
        images = [self._tower.encode(of_image, settings) for of_image in pixels]
        sizes = [len(image.features) for image in images]
        if sum(sizes) != int(is_image.sum()):
            raise ValueError(f"{int(is_image.sum())} image tokens, images need {sizes}")
        image_rows = list(is_image.nonzero().flatten().split(sizes)) if sizes else []
        rows = self._text.embed_tokens(tokens.masked_fill(is_image, 0))
        for target, image in zip(image_rows, images, strict=True):
            rows[target] = image.features
        text_rows = (~is_image).nonzero().flatten()
        judging_rows = [text_rows[text_rows > of_image[-1]] for of_image in image_rows]
        return _Prompt(rows, images, image_rows, judging_rows)

    def _prefill(self, prompt: _Prompt, settings: MustDropSettings) -> _Prefill:
        """Run the prompt and decide; a filter layer itself still runs on the tokens it judges."""
        hidden, rope = prompt.rows, self._rope(prompt.rows)
        current = [image.alive for image in prompt.images]
        kept: list[Kept] = []
        margins: list[dict[str, float]] = []
        for index, layer in enumerate(self._layers):
            kept.append(current)
            visible = visible_columns(prompt, current, len(hidden))
            heads = project_heads(layer, hidden, rope)
            if index in settings.filter_layers:
                verdicts = _judge(prompt, heads, visible, current, settings)
                current = [
                    [token for token, goes in zip(tokens, verdict.goes.tolist(), strict=True) if not goes]
                    for tokens, verdict in zip(current, verdicts, strict=True)
                ]
                margins += [{"global": v.global_margin, "individual": v.individual_margin} for v in verdicts]
            hidden = run_layer(layer, hidden, heads, visible)
        return _Prefill(self._head(hidden), kept, current, _nearest(margins))

    def _extend(
        self, prompt: _Prompt, generated: list[int], kept: Sequence[Kept], cached: Sequence[Kept]
    ) -> torch.Tensor:
        """[vocabulary] after ``generated``: per layer prompt rows see what is ``kept``, generated ones ``cached``."""
        new_tokens = torch.tensor(generated, device=prompt.rows.device)
        hidden = torch.cat([prompt.rows, self._text.embed_tokens(new_tokens)])
        rope = self._rope(hidden)
        for layer, of_prompt, of_generated in zip(self._layers, kept, cached, strict=True):
            visible = visible_columns(prompt, of_prompt, len(hidden)).repeat(len(hidden), 1)
            visible[len(prompt.rows) :] = visible_columns(prompt, of_generated, len(hidden))
            # The mask of run_layer takes [T] columns for all rows, or [T, T] columns for each row.
            hidden = run_layer(layer, hidden, project_heads(layer, hidden, rope), visible)
        return self._head(hidden)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.lm_head(self._text.norm(hidden[-1]))

    def _rope(self, hidden: torch.Tensor) -> Rope:
        positions = torch.arange(len(hidden), device=hidden.device)[None]
        cos, sin = self._text.rotary_emb(hidden[None], position_ids=positions)
        return Rope(cos[0], sin[0])


def _judge(
    prompt: _Prompt, heads: Heads, visible: torch.Tensor, current: Kept, settings: MustDropSettings
) -> list[Verdict]:
    """Per image the verdict on its ``current`` tokens, by the layer whose ``heads`` see ``visible`` [P]."""
    mask = additive_mask(visible)
    verdicts = []
    for image, tokens, rows, judging in zip(
        prompt.images, current, prompt.image_rows, prompt.judging_rows, strict=True
    ):
        weights = attention_weights(heads.query[:, judging], heads.key, mask[judging]).mean(dim=0)
        is_key = torch.tensor([token in image.keys for token in tokens], dtype=torch.bool, device=mask.device)
        verdicts.append(
            dual_filter(weights[:, rows[tokens]], is_key, settings.global_threshold, settings.individual_threshold)
        )
    return verdicts


def _nearest(margins: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of every name the smallest margin, infinite where there is none."""
    return {name: min((some.get(name, math.inf) for some in margins), default=math.inf) for name in MARGINS}
