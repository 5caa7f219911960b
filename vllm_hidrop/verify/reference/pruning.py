"""Which rows the layers of a pass run: a method's decisions in the prompt pass, replayed for generated tokens.

Axes: P prompt rows, N rows that one layer runs, V vision tokens of one span, H query heads, D head size, E = H * D.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_hidrop.verify.reference.attention import Heads, Kept, attention_weights
from vllm_hidrop.verify.reference.decoder import repeated
from vllm_hidrop.verify.reference.mustdrop import dual_filter
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings
from vllm_hidrop.verify.reference.mustdrop_settings import check_settings as check_mustdrop
from vllm_hidrop.verify.reference.stages import OracleStage, Rule, Selector, check_stages
from vllm_hidrop.verify.reference.visipruner import Decisions, VisiPrunerSettings, contributions, edited_weights
from vllm_hidrop.verify.reference.visipruner import check_settings as check_visipruner

Attention = Callable[[int], torch.Tensor]
"""What the last prompt row pays to all P rows in a layer, mean over heads, NaN for rows that are not there."""


@dataclass(frozen=True)
class StagedSettings:
    """Fixed counts by stages (FastV, PyramidDrop, HiDrop, random, uniform): see ``stages``."""

    stages: Sequence[OracleStage]
    rule: Rule
    seed: int = 0


Settings = StagedSettings | VisiPrunerSettings | MustDropSettings


class View(NamedTuple):
    """The rows that a layer runs.

    * ``rows`` [N]: their places in the sequence, ascending; ``num_prompt``: how many are of the prompt.
    * ``spans``: per span where its tokens are among the N; ``mask`` [N, N]: additive, 0 or -inf.
    """

    rows: torch.Tensor
    num_prompt: int
    spans: list[torch.Tensor]
    mask: torch.Tensor

    def text(self) -> torch.Tensor:
        """[N]: True for the prompt's text."""
        text = torch.arange(len(self.rows), device=self.rows.device) < self.num_prompt
        for span in self.spans:
            text[span] = False
        return text


class Pruning:
    """Keeps everything. ``kept``: per layer and span what the prompt pass decided, ascending, 0-based in the span."""

    def __init__(self, spans: list[torch.Tensor]) -> None:
        self.spans = spans
        self.kept: list[Kept] = []
        self.selections: dict[int, Kept] = {}
        self.scores: dict[int, dict[int, torch.Tensor]] = {}
        self.margins: dict[str, float] = {}

    def kept_in(self, layer: int, attention: Attention) -> Kept:
        """What ``layer`` runs; in the prompt pass to be asked for layer after layer."""
        if layer == len(self.kept):
            self.kept.append(self.decide(layer, attention))
        return self.kept[layer]

    def decide(self, layer: int, attention: Attention) -> Kept:
        """What ``layer`` of the prompt pass runs."""
        return self.kept[-1] if self.kept else [list(range(len(span))) for span in self.spans]

    def cached_in(self, layer: int) -> Kept:
        """Of what ``layer`` runs, what generated tokens see."""
        return self.kept[layer]

    def weights(self, layer: int, heads: Heads, view: View) -> torch.Tensor:
        """[H, N, N]: what the rows pay to each other."""
        return attention_weights(heads.query, heads.key, view.mask)

    def observe(self, layer: int, heads: Heads, weights: torch.Tensor, view: View) -> None:
        """Look at the attention of ``layer`` in the prompt pass."""


class StagedPruning(Pruning):
    """Counts by stages."""

    def __init__(self, settings: StagedSettings, spans: list[torch.Tensor], num_layers: int) -> None:
        super().__init__(spans)
        check_stages(settings.stages, [len(span) for span in spans], num_layers)
        self._stages = {stage.first_layer: stage for stage in settings.stages}
        self._selector = Selector(settings.rule, settings.seed, spans)
        self.selections, self.scores = self._selector.selections, self._selector.scores

    def decide(self, layer: int, attention: Attention) -> Kept:
        """What ``layer`` of the prompt pass runs."""
        before = super().decide(layer, attention)
        stage = self._stages.get(layer)
        return self._selector.kept_at(stage, before, attention) if stage else before


class VisiPrunerPruning(Pruning):
    """Cuts and exits that the data decide, edited weights in shallow layers."""

    def __init__(self, settings: VisiPrunerSettings, spans: list[torch.Tensor], num_layers: int) -> None:
        super().__init__(spans)
        check_visipruner(settings, num_layers)
        self._settings = settings
        self._decisions = Decisions(settings, [len(span) for span in spans], num_layers)
        self.margins = self._decisions.margins

    def decide(self, layer: int, attention: Attention) -> Kept:
        """What ``layer`` of the prompt pass runs."""
        return self._decisions.kept_in(layer)

    def cached_in(self, layer: int) -> Kept:
        """What generated tokens see."""
        is_dropped = self._settings.drop_shallow_kv and layer < self._settings.shallow_layers
        return [[] for _ in self.spans] if is_dropped else self.kept[layer]

    def weights(self, layer: int, heads: Heads, view: View) -> torch.Tensor:
        """Edited in shallow layers."""
        return edited_weights(layer, heads, view.mask, view.text(), view.spans, self._settings)

    def observe(self, layer: int, heads: Heads, weights: torch.Tensor, view: View) -> None:
        """Decide by the attention of ``layer``."""
        value = repeated(heads)
        output = (weights[:, -1:].to(value.dtype) @ value).transpose(0, 1).flatten()
        vectors = []
        for span, tokens, places in zip(self.spans, self.kept[layer], view.spans, strict=True):
            of_span = torch.full((len(span), len(output)), torch.nan, device=output.device)
            of_span[tokens] = contributions(weights[:, -1, places], value[:, places]).float()
            vectors.append(of_span)
        self._decisions.observe(layer, output, vectors)


class MustDropPruning(Pruning):
    """The dual attention filter and the cut of the cache; no merging and no key set, which are the tower's part."""

    def __init__(self, settings: MustDropSettings, spans: list[torch.Tensor], num_layers: int) -> None:
        super().__init__(spans)
        check_mustdrop(settings, num_layers)
        if settings.merge_threshold is not None or settings.key_rate:
            raise ValueError("merging and key sets belong to LLaVA-1.5's tower")
        self._settings = settings
        self._survivors: Kept = [list(range(len(span))) for span in spans]
        self.margins = dict.fromkeys(("global", "individual"), math.inf)

    def decide(self, layer: int, attention: Attention) -> Kept:
        """What ``layer`` of the prompt pass runs."""
        return self._survivors

    def cached_in(self, layer: int) -> Kept:
        """What generated tokens see."""
        first = min(self._settings.filter_layers, default=math.inf)
        return self._survivors if self._settings.cut_cache and layer >= first else self.kept[layer]

    def observe(self, layer: int, heads: Heads, weights: torch.Tensor, view: View) -> None:
        """Decide by the attention of ``layer``."""
        if layer not in self._settings.filter_layers:
            return
        gamma, alpha = self._settings.global_threshold, self._settings.individual_threshold
        survivors = []
        for span, tokens, places in zip(self.spans, self._survivors, view.spans, strict=True):
            judging = view.text() & (view.rows > span[-1])
            attention = weights[:, judging].mean(dim=0)[:, places]
            verdict = dual_filter(attention, torch.zeros_like(places, dtype=torch.bool), gamma, alpha)
            survivors.append([token for token, goes in zip(tokens, verdict.goes.tolist(), strict=True) if not goes])
            self.margins["global"] = min(self.margins["global"], verdict.global_margin)
            self.margins["individual"] = min(self.margins["individual"], verdict.individual_margin)
        self._survivors = survivors


def pruning_of(settings: Settings | None, spans: list[torch.Tensor], num_layers: int) -> Pruning:
    """The decisions of one request under ``settings``; None keeps everything. Raises ValueError for bad ones."""
    match settings:
        case None:
            return Pruning(spans)
        case StagedSettings():
            return StagedPruning(settings, spans, num_layers)
        case VisiPrunerSettings():
            return VisiPrunerPruning(settings, spans, num_layers)
        case MustDropSettings():
            return MustDropPruning(settings, spans, num_layers)
