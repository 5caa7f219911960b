"""Dense float32 reference for positions "renumbered": after every cut the sequence, text included, counts 0 .. n - 1.

Knows Hugging Face modules only: nothing of the engine, of vLLM, of batches or method names. Unlike ``masked``,
where pruning is a mask, rows are really taken out here: the state between two layers is a dictionary from a row's place
in the full prompt to its vector, its order is the order of the sequence. What a layer made of the prompt stays as it is
for decode: a key keeps the id that its row had when that layer ran. Tokens are then fed back one at a time.

**Sources** (facts read in the released programs; no code of theirs)

* PyramidDrop, Cooperx521/PyramidDrop, llava/model/modeling_llama_pdrop.py: a cut ranks by queries and keys of the first
  shorter layer under the ids before the cut, then numbers what is left anew (pdrop_rank_drop). A generated token starts
  with the full prompt's length, and loses at each boundary what the cut there dropped (pdrop_forward): in every layer
  its id is the number of entries in that layer's cache. Counts are the floor of a ratio of all V, not of the survivors.
* MustDrop, liuting20/MustDrop, multimodal_encoder/local_merge.py: [merged windows by falling similarity, then all
  patches of unmerged windows in raster order] is the order of the sequence, numbered 0 .. n - 1 from layer 0.
  language_model/modelling_sparse_llama.py: the order stays, ids are cut to the first n after each filter. A generated
  token's id in a layer is the number of entries in that layer's cache (:381-382). That number is taken after the cut of
  the cache, so in the layers from the first filter to the last one it is smaller than ids of keys in that very cache.

Run once on equal weights (12 tiny Llamas, one image, 6 tokens; sizes and thresholds patched into the releases): all
tokens and all ids in prefill and decode equal, logits within 4e-5, MustDrop with "cache_length".

**Differs** images may be many: each is cut to its own count, merges by its own threshold, and is judged by the text
behind it. Equal scores: the lowest patch first; equal similarities: the first window. Layers without vision (late
injection) number their text alone. ``DecodeIds`` "after_prompt" is ours.

Axes: P rows of the full prompt, n rows that a layer runs, V patches of one image, H query heads, G key/value heads, D
head size, C hidden size.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.oracles.masked import Oracle
from vllm_hidrop.verify.reference.attention import (
    Heads,
    Kept,
    attention_weights,
    random_scores,
    top_indices,
    uniform_indices,
)
from vllm_hidrop.verify.reference.mustdrop import (
    MARGINS,
    MustDropOracle,
    dual_filter,
)
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings, check_settings
from vllm_hidrop.verify.reference.mustdrop_tower import run_tower_layer, similarity, smallest, window_patches
from vllm_hidrop.verify.reference.stages import OracleStage, Rule, check_stages

Positions = Literal["renumbered", "persistent"]
"""The ids of the n rows of a layer: 0 .. n - 1, or their places in the full prompt."""
Order = Literal["merged_first", "raster"]
"""Of an image's tokens under MustDrop; in raster order a merged window has the place of its bottom-right patch."""
DecodeIds = Literal["cache_length", "after_prompt"]
"""The id of a generated token in a layer: the entries in that layer's cache (both releases), or one more than the id
before it, so that distances are those of the rows the layer ran. They differ only where MustDrop cuts the cache."""


@dataclass(frozen=True)
class RenumberedResult:
    """What one request produced; all tensors are float32 and on the CPU.

    * ``token_ids``: greedy tokens, a stop id included.
    * ``logits``: [generated, vocabulary], the logits that chose each token.
    * ``kept``: per layer and image the patches that the layer ran, raster indices, ascending.
    * ``rows``, ``ids``: per layer the rows it ran, in the order of the sequence, as places in the full prompt, and the
      id of each.
    * ``cached``: per layer the rows left in its cache when decode starts.
    * ``generated_ids``: per generated token that was fed back its id in each layer.
    * ``keys`` (after RoPE), ``values``: per layer [cached, G, D] when decode starts.
    * ``margins``: how near the nearest decision was to falling otherwise, infinite where none was made. "cut": score of
      the last kept token - score of the first dropped one; "logit": of the best token - of the second; "order":
      between two merged windows next to each other; "merge", "key", "global", "individual": see MustDropResult.
    """

    token_ids: list[int]
    logits: torch.Tensor
    kept: list[Kept]
    rows: list[list[int]]
    ids: list[list[int]]
    cached: list[list[int]]
    generated_ids: list[list[int]]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    margins: dict[str, float]


State = dict[int, torch.Tensor]
"""Row (its place in the full prompt) -> [C] entering the next layer, in the order of the sequence."""


def project_heads(layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Heads:
    """What ``layer`` makes of the residual stream [T, C]: input norm, projections, RoPE."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=0)
    return Heads(query, key, value)


class _Ran(NamedTuple):
    """What a layer has of the prompt: its rows, their ids, and of each query [H, n, D], key and value [G, n, D]."""

    rows: list[int]
    ids: list[int]
    heads: Heads

    def only(self, survivors: Collection[int]) -> "_Ran":
        """Without the rows that are no ``survivors``."""
        left = [place for place, row in enumerate(self.rows) if row in survivors]
        heads = Heads(*(tensor[:, left] for tensor in self.heads))
        return _Ran([self.rows[place] for place in left], [self.ids[place] for place in left], heads)


class _Prefill(NamedTuple):
    """``state`` after the last layer; what each layer ``ran`` and what of it stays ``cached``; margins."""

    state: State
    ran: list[_Ran]
    cached: list[_Ran]
    margins: dict[str, float]


def number(rows: Sequence[int], positions: Positions) -> list[int]:
    """The ids of ``rows``, which are in the order of the sequence."""
    return list(range(len(rows))) if positions == "renumbered" else list(rows)


def nearest(margins: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every name the smallest margin, infinite where there is none."""
    names = ("cut", "logit", "order", *MARGINS)
    return {name: min((some.get(name, math.inf) for some in margins), default=math.inf) for name in names}


def gap(scores: torch.Tensor, keep: int) -> float:
    """By how much the last of the ``keep`` highest of [M] scores beats the next one."""
    ordered = scores.sort(descending=True).values
    return smallest(ordered[keep - 1 : keep] - ordered[keep : keep + 1])


def merged_first(scores: Mapping[int, float], alive: list[int]) -> list[int]:
    """Patches ``alive``: first the merged windows by falling score, then the others, ascending.

    ``scores`` are the similarities of the merged windows by the patch that holds their mean.
    """
    merged = sorted(scores, key=lambda patch: (-scores[patch], patch))
    return [*merged, *(patch for patch in alive if patch not in scores)]


class RenumberedOracle:
    """Greedy generation of one LLaVA request whose rows are numbered anew after every cut.

    Text models: Llama, Mistral, Qwen2 (RMSNorm, GQA, optional biases; no sliding window). A model that is passed in
    must be float32; it is put into eval mode with eager attention. ``shifts`` adds a constant to all ids of a layer:
    RoPE is relative, so nothing may change by it.
    """

    def __init__(
        self, model: str | Path | LlavaForConditionalGeneration, shifts: Mapping[int, int] | None = None
    ) -> None:
        if isinstance(model, str | Path):
            model = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
        self._staged, self._mustdrop = Oracle(model), MustDropOracle(model)
        self._model: Any = model
        self._text: Any = self._model.model.language_model
        self._layers: list[Any] = list(self._text.layers)
        self._shifts = shifts or {}

    @torch.no_grad()
    def generate(
        self,
        token_ids: list[int],
        pixel_values: torch.Tensor | None,
        stages: Sequence[OracleStage],
        rule: Rule,
        max_tokens: int,
        seed: int = 0,
        stop_ids: Collection[int] = (),
        positions: Positions = "renumbered",
    ) -> RenumberedResult:
        """Generate at most ``max_tokens`` (>= 1) tokens under fixed ``stages``; input as of ``Oracle.generate``.

        A stage ranks by what the last row pays under the ids before its cut: PyramidDrop's rule is "attention_next",
        FastV's is "attention_previous".
        """
        self._check(rule, Rule, len(token_ids), max_tokens)
        prompt = self._staged._prepare(token_ids, pixel_values)
        image_rows = [rows.tolist() for rows in prompt.image_rows]
        check_stages(stages, [len(rows) for rows in image_rows], len(self._layers))
        features = {
            row: feature
            for rows, of_image in zip(image_rows, prompt.image_features, strict=True)
            for row, feature in zip(rows, of_image, strict=True)
        }
        stage_at = {stage.first_layer: stage for stage in stages}
        state: State = dict(enumerate(prompt.rows))
        kept: Kept = [list(range(len(rows))) for rows in image_rows]
        ran: list[_Ran] = []
        margins: list[dict[str, float]] = []
        for index in range(len(self._layers)):
            if index in stage_at:
                cuts = list(zip(stage_at[index].keep, kept, image_rows, strict=True))
                scores: dict[int, float] = {}
                if rule != "uniform" and any(0 < keep < len(patches) for keep, patches, _ in cuts):
                    scores = self._scores(rule, seed, index, state, ran, positions, image_rows)
                chosen = [_choose(rule, keep, patches, rows, scores) for keep, patches, rows in cuts]
                kept = [patches for patches, _ in chosen]
                margins += [{"cut": margin} for _, margin in chosen]
                state = _present(state, kept, image_rows, features)
            state = self._run(index, state, positions, ran)
        prefill = _Prefill(state, ran, ran, nearest(margins))
        return self._decode(prefill, image_rows, max_tokens, stop_ids, "after_prompt")

    @torch.no_grad()
    def generate_mustdrop(
        self,
        token_ids: list[int],
        pixel_values: torch.Tensor | None,
        settings: MustDropSettings,
        max_tokens: int,
        stop_ids: Collection[int] = (),
        positions: Positions = "renumbered",
        order: Order = "merged_first",
        decode_ids: DecodeIds = "cache_length",
    ) -> RenumberedResult:
        """Generate at most ``max_tokens`` (>= 1) tokens under MustDrop; input as of ``MustDropOracle.generate``.

        Persistent positions need ``decode_ids`` "after_prompt"; the other oracle has them in "raster" order.
        """
        self._check(order, Order, len(token_ids), max_tokens)
        if positions == "persistent" and decode_ids != "after_prompt":
            raise ValueError("persistent positions go on after the prompt")
        check_settings(settings, len(self._layers))
        images = self._mustdrop._encode(pixel_values, None, settings)
        prompt = self._mustdrop._prepare(token_ids, images)
        image_rows = [rows.tolist() for rows in prompt.image_rows]
        margins = [image.margins for image in prompt.images]
        orders: Kept = [image.alive for image in prompt.images]
        if order == "merged_first" and settings.merge_threshold is not None:
            pixels = () if pixel_values is None else pixel_values
            scores = [self._merged(*both, settings) for both in zip(pixels, orders, strict=True)]
            orders = [merged_first(*both) for both in zip(scores, orders, strict=True)]
            margins += [{"order": _closest(of_image.values())} for of_image in scores]
        state = {row: prompt.rows[row] for row in _sequence(len(token_ids), image_rows, orders)}
        ran: list[_Ran] = []
        for index in range(len(self._layers)):
            state = self._run(index, state, positions, ran)
            if index in settings.filter_layers:
                for image, rows, judges in zip(prompt.images, image_rows, prompt.judging_rows, strict=True):
                    verdict = _judge(ran[-1], rows, judges.tolist(), image.keys, settings)
                    margins.append({"global": verdict.global_margin, "individual": verdict.individual_margin})
                    state = {row: state[row] for row in state if row not in verdict.gone}
        first = settings.filter_layers[0] if settings.cut_cache and settings.filter_layers else len(ran)
        cached = [*ran[:first], *(of_layer.only(state) for of_layer in ran[first:])]
        prefill = _Prefill(state, ran, cached, nearest(margins))
        return self._decode(prefill, image_rows, max_tokens, stop_ids, decode_ids)

    def _check(self, value: str, known: Any, num_rows: int, max_tokens: int) -> None:
        if value not in get_args(known):
            raise ValueError(f"unknown {value!r}, known: {get_args(known)}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self._staged._check_window(num_rows + max_tokens)

    def _merged(self, pixels: torch.Tensor, alive: list[int], settings: MustDropSettings) -> dict[int, float]:
        """Of one image [channels, height, width]: the patch that holds a merged window's mean -> its similarity."""
        tower = self._mustdrop._tower
        hidden = tower._embed(pixels.float())
        hidden = run_tower_layer(tower._layers[0], hidden, torch.ones(len(hidden), dtype=torch.bool))
        patches = hidden[tower._num_class_tokens :]
        windows = window_patches(math.isqrt(len(patches)), settings.merge_window)
        return {
            members[-1]: float(similarity(patches[members]))
            for members in windows
            if members[0] not in alive  # of a window that merged, the bottom-right patch alone is alive
        }

    def _scores(
        self,
        rule: Rule,
        seed: int,
        index: int,
        state: State,
        ran: list[_Ran],
        positions: Positions,
        image_rows: list[list[int]],
    ) -> dict[int, float]:
        """Row -> score for a cut before layer ``index``; ``state`` and its ids are those before the cut."""
        if rule == "random":
            drawn = [random_scores(seed, index, len(rows)).tolist() for rows in image_rows]
            pairs = zip(image_rows, drawn, strict=True)
            return {row: score for rows, of_rows in pairs for row, score in zip(rows, of_rows, strict=True)}
        if rule == "attention_previous":
            if not ran:
                raise ValueError("attention_previous cannot cut at layer 0")
            heads = ran[-1].heads
        else:
            heads = self._heads(index, torch.stack(list(state.values())), number(list(state), positions))
        nothing_hidden = torch.zeros(1, len(state))
        paid = attention_weights(heads.query[:, -1:], heads.key, nothing_hidden).mean(dim=0)[0]
        return dict(zip(state, paid.tolist(), strict=True))

    def _run(self, index: int, state: State, positions: Positions, ran: list[_Ran]) -> State:
        """The state after layer ``index``; what the layer had is appended to ``ran``."""
        rows = list(state)
        ids = number(rows, positions)
        hidden = torch.stack(list(state.values()))
        heads = self._heads(index, hidden, ids)
        ran.append(_Ran(rows, ids, heads))
        return dict(zip(rows, self._finish(index, hidden, heads, _causal(len(rows))), strict=True))

    def _heads(self, index: int, hidden: torch.Tensor, ids: list[int]) -> Heads:
        """Queries, keys and values of layer ``index`` for rows [n, C] at ``ids``."""
        shifted = torch.tensor(ids) + self._shifts.get(index, 0)
        cos, sin = self._text.rotary_emb(hidden[None], position_ids=shifted[None])
        return project_heads(self._layers[index], hidden, cos[0], sin[0])

    def _finish(self, index: int, hidden: torch.Tensor, heads: Heads, mask: torch.Tensor) -> torch.Tensor:
        """Layer ``index`` on rows [n, C] whose queries see keys and values [G, m, D] under an additive mask [n, m]."""
        layer = self._layers[index]
        weights = attention_weights(heads.query, heads.key, mask)
        value = heads.value.repeat_interleave(len(weights) // len(heads.value), dim=0)
        hidden = hidden + layer.self_attn.o_proj((weights @ value).transpose(0, 1).flatten(1))
        update: torch.Tensor = layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden + update

    def _decode(
        self,
        prefill: _Prefill,
        image_rows: list[list[int]],
        max_tokens: int,
        stop_ids: Collection[int],
        decode_ids: DecodeIds,
    ) -> RenumberedResult:
        caches = [([*of_layer.ids], of_layer.heads) for of_layer in prefill.cached]
        logits = [self._head(list(prefill.state.values())[-1])]
        generated = [int(logits[-1].argmax())]
        generated_ids: list[list[int]] = []
        while len(generated) < max_tokens and generated[-1] not in stop_ids:
            hidden = self._text.embed_tokens(torch.tensor(generated[-1:]))
            for index, (ids, old) in enumerate(caches):
                own = len(ids) if decode_ids == "cache_length" else ids[-1] + 1
                new = self._heads(index, hidden, [own])
                key, value = torch.cat([old.key, new.key], dim=1), torch.cat([old.value, new.value], dim=1)
                caches[index] = ([*ids, own], Heads(new.query, key, value))
                hidden = self._finish(index, hidden, caches[index][1], torch.zeros(1, len(ids) + 1))
            generated_ids.append([ids[-1] for ids, _ in caches])
            logits.append(self._head(hidden[0]))
            generated.append(int(logits[-1].argmax()))
        return RenumberedResult(
            token_ids=generated,
            logits=torch.stack(logits),
            kept=[_kept(of_layer.rows, image_rows) for of_layer in prefill.ran],
            rows=[of_layer.rows for of_layer in prefill.ran],
            ids=[of_layer.ids for of_layer in prefill.ran],
            cached=[of_layer.rows for of_layer in prefill.cached],
            generated_ids=generated_ids,
            keys=[of_layer.heads.key.transpose(0, 1) for of_layer in prefill.cached],
            values=[of_layer.heads.value.transpose(0, 1) for of_layer in prefill.cached],
            margins=nearest([prefill.margins, *({"logit": gap(of_token, 1)} for of_token in logits)]),
        )

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[vocabulary] for the last row [C]."""
        logits: torch.Tensor = self._model.lm_head(self._text.norm(hidden))
        return logits


def _choose(
    rule: Rule, keep: int, patches: list[int], rows: list[int], scores: Mapping[int, float]
) -> tuple[list[int], float]:
    """What one image keeps of ``patches``, and by how much; its patches are at ``rows`` [V] of the prompt."""
    if not patches and keep:  # injection
        return list(range(len(rows))), math.inf
    if keep in (0, len(patches)):
        return patches[:keep], math.inf
    if rule == "uniform":
        return [patches[rank] for rank in uniform_indices(len(patches), keep)], math.inf
    of_patches = torch.tensor([scores[rows[patch]] for patch in patches])
    return [patches[rank] for rank in top_indices(of_patches, keep)], gap(of_patches, keep)


def _present(state: State, kept: Kept, image_rows: list[list[int]], features: State) -> State:
    """The text of ``state`` and of each image what is ``kept``; images that enter bring their ``features``."""
    text = [row for row in state if row not in features]
    vision = [rows[patch] for patches, rows in zip(kept, image_rows, strict=True) for patch in patches]
    return {row: state[row] if row in state else features[row] for row in sorted([*text, *vision])}


def _sequence(num_rows: int, image_rows: list[list[int]], orders: Kept) -> list[int]:
    """The rows of the prompt in the order of the sequence: each image's patches in its order, at its place."""
    vision = {row for rows in image_rows for row in rows}
    images = {rows[0]: [rows[patch] for patch in order] for rows, order in zip(image_rows, orders, strict=True)}
    parts = [images.get(row, [] if row in vision else [row]) for row in range(num_rows)]
    return [row for part in parts for row in part]


class _Verdict(NamedTuple):
    """Rows that go, and the smallest distances of the two tests to their thresholds."""

    gone: set[int]
    global_margin: float
    individual_margin: float


def _judge(
    ran: _Ran, image_rows: list[int], judges: list[int], keys: list[int], settings: MustDropSettings
) -> _Verdict:
    """Judge the rows of one image that a layer ``ran`` by what the text at ``judges`` pays them there."""
    places = {row: place for place, row in enumerate(ran.rows)}
    tokens = [row for row in ran.rows if row in image_rows]
    asking = [places[row] for row in judges]
    weights = attention_weights(ran.heads.query[:, asking], ran.heads.key, _causal(len(ran.rows))[asking])
    paid = weights.mean(dim=0)[:, [places[row] for row in tokens]]
    is_key = torch.tensor([image_rows.index(row) in keys for row in tokens], dtype=torch.bool)
    goes, *margins = dual_filter(paid, is_key, settings.global_threshold, settings.individual_threshold)
    return _Verdict({row for row, gone in zip(tokens, goes.tolist(), strict=True) if gone}, *margins)


def _causal(num_rows: int) -> torch.Tensor:
    """[n, n] additive mask: a row sees itself and those before it in the sequence."""
    return torch.full((num_rows, num_rows), -torch.inf).triu(1)


def _closest(scores: Collection[float]) -> float:
    """The smallest difference between two of ``scores``."""
    ordered = torch.tensor(sorted(scores))
    return smallest(ordered[1:] - ordered[:-1])


def _kept(rows: list[int], image_rows: list[list[int]]) -> Kept:
    """Per image its patches among ``rows``, ascending."""
    return [[patch for patch, row in enumerate(of_image) if row in rows] for of_image in image_rows]
