"""Dense float32 reference for pruning vision tokens in stages; here pruning is an attention mask.

Knows Hugging Face modules only: nothing of the engine, of vLLM, of caches, batches or method names.

Every layer runs ALL rows of the sequence, always, at the positions 0, 1, 2, ... of the full prompt,
or at the ids of one of the paper's two rejected schemes. A stage decides only which vision columns
can be seen. No row is gathered or moved, so
nothing here can share a mistake with code that makes sequences physically shorter. For every
generated token the whole sequence is computed again; what was selected for the prompt stays.

Axes: P prompt rows, T rows of one pass (P + tokens generated so far), V vision tokens of one image,
H query heads, G key/value heads, D head size, C hidden size, L layers.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import LlavaForConditionalGeneration

from tests.oracles.llama import (
    Heads,
    Kept,
    Rope,
    attention_weights,
    project_heads,
    random_scores,
    run_layer,
    top_indices,
    uniform_indices,
)

Rule = Literal["attention_next", "attention_previous", "random", "uniform"]
Positions = Literal["persistent", "compacted", "grouped"]


@dataclass(frozen=True)
class OracleStage:
    """Layers that see the same vision tokens: from ``first_layer`` to the next stage's first layer.

    ``first_layer`` is zero-based and inclusive. ``keep`` counts the vision tokens of each image.
    """

    first_layer: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class OracleResult:
    """What one request produced; all tensors are float32 (``visible``: bool) and on the CPU.

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
class _Prompt:
    """``rows`` [P, C] enter layer 0; per image its prompt rows [V] and projector output [V, C]."""

    rows: torch.Tensor
    image_rows: list[torch.Tensor]
    image_features: list[torch.Tensor]


@dataclass
class _Pass:
    """Per layer: ``entering`` [T, C] (after injection), ``heads``, ``visible`` [T]; ``logits``
    [vocabulary] of the last row."""

    logits: torch.Tensor
    entering: list[torch.Tensor] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    visible: list[torch.Tensor] = field(default_factory=list)


def check_stages(stages: Sequence[OracleStage], image_sizes: list[int], num_layers: int) -> None:
    """Raise ValueError unless keep starts at any count, rises at most once, from 0 ever to all."""
    first_layers = [stage.first_layer for stage in stages]
    if not stages or first_layers[0] != 0 or first_layers[-1] >= num_layers:
        raise ValueError(f"stages must start at layer 0 and before {num_layers}: {first_layers}")
    if any(before >= after for before, after in pairwise(first_layers)):
        raise ValueError(f"first layers must rise, got {first_layers}")
    for stage in stages:
        if len(stage.keep) != len(image_sizes):
            raise ValueError(f"{len(image_sizes)} images, but keep is {stage.keep}")
    for image, size in enumerate(image_sizes):
        keeps = [stage.keep[image] for stage in stages]
        if min(keeps) < 0 or max(keeps) > size:
            raise ValueError(f"keep must be in [0, {size}], got {keeps} for image {image}")
        for index, (before, after) in enumerate(pairwise(keeps)):
            if after > before and (any(keeps[: index + 1]) or after != size):
                raise ValueError(f"keep may rise only from 0 ever to all {size}, got {keeps}")


class _Selector:
    """Decides at each stage what stays visible: once, in the prompt pass; later passes replay it.

    ``attention(layer, hidden, visible, ids)`` returns the scores [T] of ``layer`` on ``hidden`` [T, C].
    """

    def __init__(
        self,
        rule: Rule,
        seed: int,
        image_rows: list[torch.Tensor],
        attention: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        self._rule = rule
        self._seed = seed
        self._image_rows = image_rows
        self._attention = attention
        self._decided: dict[int, Kept] = {}
        self.selections: dict[int, Kept] = {}
        self.scores: dict[int, dict[int, torch.Tensor]] = {}

    def kept_at(
        self,
        stage: OracleStage,
        kept: Kept,
        entering: list[torch.Tensor],
        visible: torch.Tensor,
        ids: torch.Tensor,
    ) -> Kept:
        """What ``stage`` keeps, given what was ``kept`` and ``visible`` [T] until now, under the ``ids`` [T] until now.

        ``entering`` holds the hidden states entering the layers 0 .. ``stage.first_layer``.
        """
        layer = stage.first_layer
        if layer not in self._decided:
            is_cut = [0 < keep < len(old) for keep, old in zip(stage.keep, kept, strict=True)]
            if any(is_cut) and self._rule != "uniform":
                self.scores[layer] = self._score(layer, kept, is_cut, entering, visible, ids)
            self._decided[layer] = [
                self._keep(layer, image, keep, kept[image]) for image, keep in enumerate(stage.keep)
            ]
            if any(is_cut):
                self.selections[layer] = self._decided[layer]
        return self._decided[layer]

    def _keep(self, layer: int, image: int, keep: int, survivors: list[int]) -> list[int]:
        if keep == 0:
            return []
        if not survivors:  # injection
            return list(range(len(self._image_rows[image])))
        if keep == len(survivors):
            return survivors
        if self._rule == "uniform":
            ranks = uniform_indices(len(survivors), keep)
        else:
            ranks = top_indices(self.scores[layer][image][survivors], keep)
        return [survivors[rank] for rank in ranks]

    def _score(
        self,
        layer: int,
        kept: Kept,
        is_cut: list[bool],
        entering: list[torch.Tensor],
        visible: torch.Tensor,
        ids: torch.Tensor,
    ) -> dict[int, torch.Tensor]:
        """Per image to cut its scores [V], on the CPU, NaN for tokens that are not survivors."""
        if self._rule != "random":
            scoring_layer = layer if self._rule == "attention_next" else layer - 1
            if scoring_layer < 0:
                raise ValueError("attention_previous cannot cut at layer 0")
            row_scores = self._attention(scoring_layer, entering[scoring_layer], visible, ids)
        scores = {}
        for image, rows in enumerate(self._image_rows):
            if not is_cut[image]:
                continue
            is_random = self._rule == "random"
            of_all = random_scores(self._seed, layer, len(rows)) if is_random else row_scores[rows].cpu()
            scores[image] = torch.full_like(of_all, torch.nan)
            scores[image][kept[image]] = of_all[kept[image]]
        return scores


class Oracle:
    """Greedy generation of one LLaVA request with vision tokens hidden stage by stage.

    Text models: Llama, Mistral, Qwen2 (RMSNorm, GQA, optional biases; no sliding window). A model
    that is passed in must be float32; it is put into eval mode with eager attention.
    """

    def __init__(self, model: str | Path | LlavaForConditionalGeneration) -> None:
        if isinstance(model, str | Path):
            model = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
        if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
            raise ValueError("the oracle computes in float32, got a model in another dtype")
        model.set_attn_implementation("eager")
        self._model: Any = model.eval()
        self._text: Any = self._model.model.language_model
        self._layers: list[Any] = list(self._text.layers)

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
        check_stages(stages, [len(rows) for rows in prompt.image_rows], len(self._layers))
        selector = _Selector(rule, seed, prompt.image_rows, self._last_row_attention)

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

    def _prepare(self, token_ids: list[int], pixel_values: torch.Tensor | None) -> _Prompt:
        """Embed the text and put the projector rows at the image tokens, image after image."""
        tokens = torch.tensor(token_ids, device=self._model.device)
        is_image = tokens == self._model.config.image_token_id
        if not token_ids or is_image[-1]:
            raise ValueError("the prompt must end with text")
        features: list[torch.Tensor] = []
        if pixel_values is not None:
            pixels = pixel_values.to(tokens.device, torch.float32)
            features = list(self._model.get_image_features(pixel_values=pixels).pooler_output)
        sizes = [len(rows) for rows in features]
        if sum(sizes) != int(is_image.sum()):
            raise ValueError(f"{int(is_image.sum())} image tokens, images need {sizes}")
        image_rows = list(is_image.nonzero().flatten().split(sizes)) if sizes else []
        rows = self._text.embed_tokens(tokens.masked_fill(is_image, 0))
        for target, source in zip(image_rows, features, strict=True):
            rows[target] = source
        return _Prompt(rows, image_rows, features)

    def _run(
        self,
        prompt: _Prompt,
        generated: list[int],
        stages: Sequence[OracleStage],
        selector: _Selector,
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
        for index, layer in enumerate(self._layers):
            if index in stage_at:
                before = kept
                kept = selector.kept_at(stage_at[index], before, [*result.entering, hidden], visible, ids)
                hidden = _inject(hidden, prompt, before, kept)
                visible = _show(visible, prompt, kept)
                ids = _compacted_ids(ids, prompt, before, kept, visible) if positions == "compacted" else ids
            heads = project_heads(layer, hidden, self._rope(hidden, ids))
            result.entering.append(hidden)
            result.heads.append(heads)
            result.visible.append(visible)
            hidden = run_layer(layer, hidden, heads, visible)
        result.logits = self._model.lm_head(self._text.norm(hidden[-1]))
        return result

    def _rope(self, hidden: torch.Tensor, ids: torch.Tensor) -> Rope:
        cos, sin = self._text.rotary_emb(hidden[None], position_ids=ids[None])
        return Rope(cos[0], sin[0])

    def _last_row_attention(
        self, layer: int, hidden: torch.Tensor, visible: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """[T]: what the last row of ``hidden`` [T, C] pays to each visible row, mean over heads."""
        heads = project_heads(self._layers[layer], hidden, self._rope(hidden, ids))
        mask = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)
        return attention_weights(heads.query[:, -1:], heads.key, mask[None]).mean(dim=0)[0]


def _inject(hidden: torch.Tensor, prompt: _Prompt, before: Kept, after: Kept) -> torch.Tensor:
    """Replace the rows of images that enter now by the raw projector output."""
    hidden = hidden.clone()
    for image, rows in enumerate(prompt.image_rows):
        if after[image] and not before[image]:
            hidden[rows] = prompt.image_features[image]
    return hidden


def _show(visible: torch.Tensor, prompt: _Prompt, kept: Kept) -> torch.Tensor:
    """Of the rows [T]: all text and generated tokens, and the kept vision tokens."""
    visible = torch.ones_like(visible)
    for rows, survivors in zip(prompt.image_rows, kept, strict=True):
        visible[rows] = False
        visible[rows[survivors]] = True
    return visible


def _grouped_ids(prompt: _Prompt, num_rows: int) -> torch.Tensor:
    """[T]: text counts text, generated tokens included; vision has its places in the full prompt."""
    vision = {int(row) for rows in prompt.image_rows for row in rows}
    ids, num_text = [], 0
    for row in range(num_rows):
        ids.append(row if row in vision else num_text)
        num_text += row not in vision
    return torch.tensor(ids, device=prompt.rows.device)


def _compacted_ids(
    ids: torch.Tensor, prompt: _Prompt, before: Kept, after: Kept, visible: torch.Tensor
) -> torch.Tensor:
    """[T]: the survivors of an image that was cut count on from the id of the visible row before them."""
    new = ids.clone()
    for rows, old, survivors in zip(prompt.image_rows, before, after, strict=True):
        if 0 < len(survivors) < len(old):
            earlier = [row for row in range(int(rows[survivors[0]])) if visible[row]]
            first = int(ids[earlier[-1]]) + 1 if earlier else 0
            for rank, survivor in enumerate(survivors):
                new[rows[survivor]] = first + rank
    return new
