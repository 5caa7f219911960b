"""Dense reference for VisiPruner on LLaVA: per-image cuts and exits that the data decide, and edited weights before.

Like ``masked``, whose helpers it uses, it knows Hugging Face modules only: every layer runs ALL rows at their
original positions, a pruned token is a column that later layers cannot see (masked before softmax), and for every
generated token the whole sequence is computed again while the decisions of the prompt pass are replayed.

Axes as in ``masked``: P prompt rows, T rows of one pass, V vision tokens of one image, H query heads.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from tests.oracles.masked import Oracle, Prompt, show
from vllm_hidrop.verify.reference.attention import Heads, Kept, additive_mask
from vllm_hidrop.verify.reference.decoder import repeated
from vllm_hidrop.verify.reference.visipruner import (
    Decisions,
    VisiPrunerSettings,
    check_settings,
    contributions,
    edited_weights,
)


@dataclass(frozen=True)
class VisiPrunerResult:
    """What one request produced.

    * ``token_ids``: greedy tokens, a stop id included; ``logits``: [generated, vocabulary], on the CPU.
    * ``kept``: per layer, per image: the vision tokens present when that layer runs the prompt.
    * ``cut_layers``: per image the first layer after its cut, also if the cut kept all; None without a cut.
    * ``exit_layers``: per image the first layer without the tokens that an exit took; None if the cut left none.
    * ``margins``: smallest distance of a statistic from its threshold in all "cosine", "norm" and "exit" tests that
      were made, inf if none was; "norm" of a calibrated cut: from the last token that stays to the next.
    """

    token_ids: list[int]
    logits: torch.Tensor
    kept: list[Kept]
    cut_layers: list[int | None]
    exit_layers: list[int | None]
    margins: dict[str, float]


class VisiPrunerOracle:
    """Greedy generation of one LLaVA request under VisiPruner; models as for ``masked.Oracle``."""

    def __init__(self, model: str | Path | LlavaForConditionalGeneration, dtype: torch.dtype = torch.float32) -> None:
        self._dense = Oracle(model, dtype)
        self._decoder = self._dense._decoder

    @torch.no_grad()
    def generate(
        self,
        token_ids: list[int],
        pixel_values: torch.Tensor | None,
        settings: VisiPrunerSettings,
        max_tokens: int,
        stop_ids: Collection[int] = (),
    ) -> VisiPrunerResult:
        """Generate at most ``max_tokens`` (>= 1) tokens, ending with the first of ``stop_ids``.

        ``token_ids`` [P] hold the image token once per vision token; ``pixel_values`` is [images, channels, height,
        width], or None for text. Raises ValueError for input that has no defined meaning.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        check_settings(settings, self._decoder.num_layers)
        self._dense._check_window(len(token_ids) + max_tokens)
        prompt = self._dense._prepare(token_ids, pixel_values)
        decisions = Decisions(settings, [len(rows) for rows in prompt.image_rows], self._decoder.num_layers)
        generated: list[int] = []
        logits: list[torch.Tensor] = []
        while len(generated) < max_tokens and not (generated and generated[-1] in stop_ids):
            logits.append(self._run(prompt, generated, settings, decisions))
            generated.append(int(logits[-1].argmax()))
        return VisiPrunerResult(
            token_ids=generated,
            logits=torch.stack(logits).cpu(),
            kept=decisions.kept,
            cut_layers=decisions.cut_layers,
            exit_layers=decisions.exit_layers,
            margins=decisions.margins,
        )

    def _run(
        self, prompt: Prompt, generated: list[int], settings: VisiPrunerSettings, decisions: Decisions
    ) -> torch.Tensor:
        """Run prompt and generated tokens through all layers: the logits [vocabulary] of the last row."""
        hidden = torch.cat([prompt.rows, self._decoder.embedded(generated)])
        for index in range(self._decoder.num_layers):
            ids = self._ids(index, prompt, len(generated), decisions.kept_in(index), settings)
            weigh = partial(self._weigh, index, prompt, settings, decisions, not generated)
            hidden = self._decoder.run(index, hidden, self._decoder.numbered(hidden, ids), weigh)
        return self._decoder.logits(hidden[-1])

    def _weigh(
        self,
        index: int,
        prompt: Prompt,
        settings: VisiPrunerSettings,
        decisions: Decisions,
        is_prompt: bool,
        heads: Heads,
    ) -> torch.Tensor:
        """[H, T, T] of layer ``index``, which in the prompt pass is looked at."""
        weights = layer_weights(index, heads, prompt, decisions.kept_in(index), settings)
        if is_prompt:
            value = repeated(heads)
            output = (weights[:, -1:].to(value.dtype) @ value).transpose(0, 1).flatten()
            vectors = [contributions(weights[:, -1, rows], value[:, rows]) for rows in prompt.image_rows]
            decisions.observe(index, output, vectors)
        return weights

    def _ids(
        self, layer: int, prompt: Prompt, num_generated: int, kept: Kept, settings: VisiPrunerSettings
    ) -> torch.Tensor:
        """[T]: the ids of all rows in ``layer``, places in the full sequence."""
        return torch.arange(len(prompt.rows) + num_generated, device=prompt.rows.device)


class RenumberedVisiPrunerOracle(VisiPrunerOracle):
    """The same where each layer numbers the rows it sees 0, 1, 2, ..., and generated ones by its cache's length."""

    def _ids(
        self, layer: int, prompt: Prompt, num_generated: int, kept: Kept, settings: VisiPrunerSettings
    ) -> torch.Tensor:
        everything = torch.ones(len(prompt.rows), dtype=torch.bool, device=prompt.rows.device)
        visible = show(everything, prompt, kept)
        is_dropped = layer < settings.shallow_layers and settings.drop_shallow_kv
        cached = show(everything, prompt, [[] for _ in kept]) if is_dropped else visible
        generated = torch.arange(num_generated, device=prompt.rows.device) + cached.sum()
        return torch.cat([visible.cumsum(0) - 1, generated])


def layer_weights(layer: int, heads: Heads, prompt: Prompt, kept: Kept, settings: VisiPrunerSettings) -> torch.Tensor:
    """[H, T, T]: what the rows of ``layer`` pay to each column, after the edits of a shallow layer."""
    num_prompt, num_rows = len(prompt.rows), heads.query.shape[1]
    everything = torch.ones(num_rows, dtype=torch.bool, device=prompt.rows.device)
    mask = additive_mask(show(everything, prompt, kept))
    text = show(everything, prompt, [[] for _ in kept])
    if layer < settings.shallow_layers and settings.drop_shallow_kv:
        mask[num_prompt:, ~text] = -torch.inf
    text[num_prompt:] = False  # generated rows are not edited
    return edited_weights(layer, heads, mask, text, prompt.image_rows, settings)
