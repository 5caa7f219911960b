"""Dense reference for MustDrop; merging, filtering and cutting the cache are attention masks here.

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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from vllm_hidrop.verify.reference.attention import (
    Heads,
    Kept,
    MaskedWeights,
    additive_mask,
    attention_weights,
    load_model,
)
from vllm_hidrop.verify.reference.decoder import Decoder, Given
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings, check_settings
from vllm_hidrop.verify.reference.mustdrop_tiles import encode_tiles
from vllm_hidrop.verify.reference.mustdrop_tower import EncodedImage, Tower, smallest

MARGINS = ("merge", "key", "global", "individual")


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


class Verdict(NamedTuple):
    """``goes`` [N] (bool) and the smallest distances of the two tests to their thresholds."""

    goes: torch.Tensor
    global_margin: float
    individual_margin: float


@dataclass(frozen=True)
class _Prompt:
    """``rows`` [P, C] enter layer 0; per image its rows [V] in the prompt and the text rows [R] after it."""

    rows: torch.Tensor
    images: list[EncodedImage]
    image_rows: list[torch.Tensor]
    judging_rows: list[torch.Tensor]


class _Prefill(NamedTuple):
    """``logits`` [vocabulary] of the last row, ``kept`` per layer, ``survivors`` of the last filter, margins."""

    logits: torch.Tensor
    kept: list[Kept]
    survivors: Kept
    margins: dict[str, float]


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


def visible_columns(prompt: _Prompt, kept: Kept, num_rows: int) -> torch.Tensor:
    """[T]: all text and generated tokens, and the ``kept`` vision tokens."""
    visible = torch.ones(num_rows, dtype=torch.bool, device=prompt.rows.device)
    for rows, survivors in zip(prompt.image_rows, kept, strict=True):
        visible[rows] = False
        visible[rows[survivors]] = True
    return visible


class MustDropOracle:
    """Greedy generation of one LLaVA or LLaVA-NeXT request under MustDrop, every image on its own.

    Text models: Llama, Mistral, Qwen2 (RMSNorm, GQA, optional biases; no sliding window). Towers: CLIP, and
    SigLIP without a key set. A model that is passed in must be of ``dtype``; it is put into eval mode.
    """

    def __init__(
        self,
        model: str | Path | LlavaForConditionalGeneration | LlavaNextForConditionalGeneration,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model = load_model(model, dtype)
        self._text: Any = self._model.model.language_model
        self._decoder = Decoder(self._model)
        self._tower = Tower(self._model)

    @torch.no_grad()
    def generate(
        self,
        token_ids: list[int],
        pixel_values: torch.Tensor | None,
        settings: MustDropSettings,
        max_tokens: int,
        stop_ids: Collection[int] = (),
        image_sizes: torch.Tensor | None = None,
    ) -> MustDropResult:
        """Generate at most ``max_tokens`` (>= 1) tokens, ending with the first of ``stop_ids``.

        ``token_ids`` [P] hold the image token once per patch of the full grid and end with text;
        ``pixel_values`` is [images, channels, height, width], or None for text. LLaVA-NeXT: [images, tiles, channels,
        height, width], and ``image_sizes`` [images, 2] are heights and widths. Raises ValueError for input
        that has no defined meaning.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self._check_window(len(token_ids) + max_tokens)
        check_settings(settings, self._decoder.num_layers)
        prompt = self._prepare(token_ids, self._encode(pixel_values, image_sizes, settings))
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

    def _encode(
        self, pixel_values: torch.Tensor | None, image_sizes: torch.Tensor | None, settings: MustDropSettings
    ) -> list[EncodedImage]:
        pixels = () if pixel_values is None else pixel_values.to(self._model.device, self._model.dtype)
        if image_sizes is None:
            return [self._tower.encode(of_image, settings) for of_image in pixels]
        return [
            encode_tiles(self._model, self._tower, of_image, size, settings)
            for of_image, size in zip(pixels, image_sizes, strict=True)
        ]

    def _prepare(self, token_ids: list[int], images: list[EncodedImage]) -> _Prompt:
        """Embed the text and put the projector rows at the image tokens, image after image."""
        tokens = torch.tensor(token_ids, device=self._model.device)
        is_image = tokens == self._model.config.image_token_id
        if not token_ids or is_image[-1]:
            raise ValueError("the prompt must end with text")
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
        hidden, given = prompt.rows, self._numbered(prompt.rows)
        current = [image.alive for image in prompt.images]
        kept: list[Kept] = []
        margins: list[dict[str, float]] = []
        for index in range(self._decoder.num_layers):
            kept.append(current)
            visible = visible_columns(prompt, current, len(hidden))
            weigh = MaskedWeights(additive_mask(visible))
            hidden = self._decoder.run(index, hidden, given, weigh)
            if index in settings.filter_layers:
                verdicts = _judge(prompt, weigh.heads, visible, current, settings)
                current = [
                    [token for token, goes in zip(tokens, verdict.goes.tolist(), strict=True) if not goes]
                    for tokens, verdict in zip(current, verdicts, strict=True)
                ]
                margins += [{"global": v.global_margin, "individual": v.individual_margin} for v in verdicts]
        return _Prefill(self._decoder.logits(hidden[-1]), kept, current, _nearest(margins))

    def _extend(
        self, prompt: _Prompt, generated: list[int], kept: Sequence[Kept], cached: Sequence[Kept]
    ) -> torch.Tensor:
        """[vocabulary] after ``generated``: per layer prompt rows see what is ``kept``, generated ones ``cached``."""
        hidden = torch.cat([prompt.rows, self._decoder.embedded(generated)])
        given = self._numbered(hidden)
        for index, (of_prompt, of_generated) in enumerate(zip(kept, cached, strict=True)):
            visible = visible_columns(prompt, of_prompt, len(hidden)).repeat(len(hidden), 1)
            visible[len(prompt.rows) :] = visible_columns(prompt, of_generated, len(hidden))
            hidden = self._decoder.run(index, hidden, given, MaskedWeights(additive_mask(visible)))
        return self._decoder.logits(hidden[-1])

    def _numbered(self, hidden: torch.Tensor) -> Given:
        return self._decoder.numbered(hidden, torch.arange(len(hidden), device=hidden.device))


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
