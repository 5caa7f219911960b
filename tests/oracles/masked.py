"""Dense reference for pruning vision tokens in stages; here pruning is an attention mask.

Knows Hugging Face modules only: nothing of the engine, of vLLM, of caches, batches or method names.

Every layer runs ALL rows of the sequence, always, at the positions 0, 1, 2, ... of the full prompt,
or at the ids of one of the paper's two rejected schemes. A stage decides only which vision columns
can be seen. No row is gathered or moved, so nothing here can share a mistake with code that makes
sequences physically shorter. For every generated token the whole sequence is computed again; what was
selected for the prompt stays.

Axes: P prompt rows, T rows of one pass (P + tokens generated so far), V vision tokens of one image,
H query heads, G key/value heads, D head size, C hidden size, L layers.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import LlavaForConditionalGeneration

from vllm_hidrop.verify.reference.attention import (
    Heads,
    Kept,
    MaskedWeights,
    additive_mask,
    attention_weights,
    load_model,
)
from vllm_hidrop.verify.reference.decoder import Decoder
from vllm_hidrop.verify.reference.stages import OracleStage, Rule, Selector, check_stages

Positions = Literal["persistent", "compacted", "grouped"]


@dataclass(frozen=True)
class OracleResult:
    """What one request produced; logits and scores are float32, all tensors on the CPU.

    * ``token_ids``: greedy tokens, a stop id included.
    * ``logits``: [generated, vocabulary], the logits that chose each token.
    * ``selections``: first layer of a stage -> what each image keeps there. Only stages in which
      the rule really chose for at least one image (not: all, none, injection, unchanged).
    * ``scores``: first layer of a stage -> image -> [V] scores of an image that was cut there, NaN
      for tokens that had already gone. Tells a near tie from an error. Empty for ``uniform``.
    * ``keys`` (after RoPE), ``values``: per layer [P, G, D] of the prompt, invisible rows included.
    * ``visible``: per layer [P], the prompt rows that exist in that layer.
    """

    token_ids: list[int]
    logits: torch.Tensor
    selections: dict[int, Kept]
    scores: dict[int, dict[int, torch.Tensor]]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    visible: list[torch.Tensor]


@dataclass(frozen=True)
class Prompt:
    """``rows`` [P, C] enter layer 0; per image its prompt rows [V] and projector output [V, C]."""

    rows: torch.Tensor
    image_rows: list[torch.Tensor]
    image_features: list[torch.Tensor]


@dataclass
class _Pass:
    """Per layer: ``entering`` [T, C] (after injection), ``heads``, ``visible`` [T]; ``logits`` of the last row."""

    logits: torch.Tensor
    entering: list[torch.Tensor] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    visible: list[torch.Tensor] = field(default_factory=list)


class Oracle:
    """Greedy generation of one LLaVA request with vision tokens hidden stage by stage.

    Text models: Llama, Mistral, Qwen2 (RMSNorm, GQA, optional biases; no sliding window). A model
    that is passed in must be of ``dtype``; it is put into eval mode with eager attention.
    """

    def __init__(self, model: str | Path | LlavaForConditionalGeneration, dtype: torch.dtype = torch.float32) -> None:
        self._model = load_model(model, dtype)
        self._model.set_attn_implementation("eager")
        self._text: Any = self._model.model.language_model
        self._decoder = Decoder(self._model)

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
        positions: Positions = "persistent",
    ) -> OracleResult:
        """Generate at most ``max_tokens`` (>= 1) tokens, ending with the first of ``stop_ids``.

        ``token_ids`` [P] hold the image token once per vision token; ``pixel_values`` is [images,
        channels, height, width], or None for text. At the first stage all vision tokens count as
        present, so ``keep`` below all is a cut at layer 0. ``positions`` say which RoPE ids rows have
        (HiDrop section 4.3): "compacted" numbers the survivors of a cut on from the visible row before
        them, "grouped" counts text alone for text. Raises ValueError for input that has no
        defined meaning (see ``check_stages``).
        """
        if rule not in get_args(Rule):
            raise ValueError(f"unknown rule {rule!r}, known: {get_args(Rule)}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self._check_window(len(token_ids) + max_tokens)
        prompt = self._prepare(token_ids, pixel_values)
        check_stages(stages, [len(rows) for rows in prompt.image_rows], self._decoder.num_layers)
        selector = Selector(rule, seed, prompt.image_rows)

        prompt_pass = self._run(prompt, [], stages, selector, positions)
        generated: list[int] = []
        logits = [prompt_pass.logits]
        while True:
            generated.append(int(logits[-1].argmax()))
            if len(generated) == max_tokens or generated[-1] in stop_ids:
                break
            logits.append(self._run(prompt, generated, stages, selector, positions).logits)
        return OracleResult(
            token_ids=generated,
            logits=torch.stack(logits).cpu(),
            selections=selector.selections,
            scores=selector.scores,
            keys=[heads.key.transpose(0, 1).cpu() for heads in prompt_pass.heads],
            values=[heads.value.transpose(0, 1).cpu() for heads in prompt_pass.heads],
            visible=[visible.cpu() for visible in prompt_pass.visible],
        )

    def _check_window(self, num_rows: int) -> None:
        window = getattr(self._text.config, "sliding_window", None)
        if window is not None and window < num_rows:
            raise ValueError(f"{num_rows} rows exceed the sliding window of {window}")

    def _prepare(self, token_ids: list[int], pixel_values: torch.Tensor | None) -> Prompt:
        """Embed the text and put the projector rows at the image tokens, image after image."""
        tokens = torch.tensor(token_ids, device=self._model.device)
        is_image = tokens == self._model.config.image_token_id
        if not token_ids or is_image[-1]:
            raise ValueError("the prompt must end with text")
        features: list[torch.Tensor] = []
        if pixel_values is not None:
            pixels = pixel_values.to(tokens.device, self._model.dtype)
            features = list(self._model.get_image_features(pixel_values=pixels).pooler_output)
        sizes = [len(rows) for rows in features]
        if sum(sizes) != int(is_image.sum()):
            raise ValueError(f"{int(is_image.sum())} image tokens, images need {sizes}")
        image_rows = list(is_image.nonzero().flatten().split(sizes)) if sizes else []
        rows = self._text.embed_tokens(tokens.masked_fill(is_image, 0))
        for target, source in zip(image_rows, features, strict=True):
            rows[target] = source
        return Prompt(rows, image_rows, features)

    def _run(
        self,
        prompt: Prompt,
        generated: list[int],
        stages: Sequence[OracleStage],
        selector: Selector,
        positions: Positions,
    ) -> _Pass:
        """Run prompt and generated tokens through all layers; return every layer's tensors."""
        device = prompt.rows.device
        new_tokens = torch.tensor(generated, dtype=torch.long, device=device)
        hidden = torch.cat([prompt.rows, self._text.embed_tokens(new_tokens)])
        ids = _grouped_ids(prompt, len(hidden)) if positions == "grouped" else torch.arange(len(hidden), device=device)
        stage_at = {stage.first_layer: stage for stage in stages}
        kept: Kept = [list(range(len(rows))) for rows in prompt.image_rows]
        visible = torch.ones(len(hidden), dtype=torch.bool, device=device)
        result = _Pass(logits=torch.empty(0))
        for index in range(self._decoder.num_layers):
            if index in stage_at:
                before = kept
                attention = partial(self._last_row_attention, [*result.entering, hidden], visible, ids)
                kept = selector.kept_at(stage_at[index], before, attention)
                hidden = _inject(hidden, prompt, before, kept)
                visible = show(visible, prompt, kept)
                ids = _compacted_ids(ids, prompt, before, kept, visible) if positions == "compacted" else ids
                given, weigh = self._decoder.numbered(hidden, ids), MaskedWeights(additive_mask(visible))
            result.entering.append(hidden)
            result.visible.append(visible)
            hidden = self._decoder.run(index, hidden, given, weigh)
            result.heads.append(weigh.heads)
        result.logits = self._decoder.logits(hidden[-1])
        return result

    def _last_row_attention(
        self, entering: list[torch.Tensor], visible: torch.Tensor, ids: torch.Tensor, layer: int
    ) -> torch.Tensor:
        """[T]: what the last row pays to each visible row in ``layer``, mean over heads; all ``entering`` [T, C]."""
        hidden = entering[layer]
        weigh = MaskedWeights(additive_mask(visible))
        self._decoder.run(layer, hidden, self._decoder.numbered(hidden, ids), weigh)
        mask = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)
        return attention_weights(weigh.heads.query[:, -1:], weigh.heads.key, mask[None]).mean(dim=0)[0]


def _inject(hidden: torch.Tensor, prompt: Prompt, before: Kept, after: Kept) -> torch.Tensor:
    """Replace the rows of images that enter now by the raw projector output."""
    hidden = hidden.clone()
    for image, rows in enumerate(prompt.image_rows):
        if after[image] and not before[image]:
            hidden[rows] = prompt.image_features[image]
    return hidden


def show(visible: torch.Tensor, prompt: Prompt, kept: Kept) -> torch.Tensor:
    """Of the rows [T]: all text and generated tokens, and the kept vision tokens."""
    visible = torch.ones_like(visible)
    for rows, survivors in zip(prompt.image_rows, kept, strict=True):
        visible[rows] = False
        visible[rows[survivors]] = True
    return visible


def _grouped_ids(prompt: Prompt, num_rows: int) -> torch.Tensor:
    """[T]: text counts text, generated tokens included; vision has its places in the full prompt."""
    vision = {int(row) for rows in prompt.image_rows for row in rows}
    ids, num_text = [], 0
    for row in range(num_rows):
        ids.append(row if row in vision else num_text)
        num_text += row not in vision
    return torch.tensor(ids, device=prompt.rows.device)


def _compacted_ids(ids: torch.Tensor, prompt: Prompt, before: Kept, after: Kept, visible: torch.Tensor) -> torch.Tensor:
    """[T]: the survivors of an image that was cut count on from the id of the visible row before them."""
    new = ids.clone()
    for rows, old, survivors in zip(prompt.image_rows, before, after, strict=True):
        if 0 < len(survivors) < len(old):
            earlier = [row for row in range(int(rows[survivors[0]])) if visible[row]]
            first = int(ids[earlier[-1]]) + 1 if earlier else 0
            for rank, survivor in enumerate(survivors):
                new[rows[survivor]] = first + rank
    return new
