"""What is looked at, and edited, in the attention of a stage's layers.

Knows where rows stand and who asks for which signal; not the layers themselves.
"""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from vllm.forward_context import get_forward_context

from vllm_hidrop.methods.adaptive import AttentionEdit, Decider, Verdict
from vllm_hidrop.methods.scoring import Contribution, TextAttention
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.staged.adaptive import Decisions, Key
from vllm_hidrop.staged.attention_edits import Heads, edited_rows
from vllm_hidrop.staged.image_runs import ImageRun, PromptRows, prompt_rows, scored_before
from vllm_hidrop.staged.signals import contribution, row_attention, text_attention
from vllm_hidrop.staged.step import PrunedPrefill, StagedStep
from vllm_hidrop.staged.tensor_parallel import mean_over_ranks, means_over_ranks, sum_over_ranks

Scores = dict[Key, torch.Tensor]
"""(request's place in the batch, image) -> float32 [V], attention to its tokens."""
Edit = tuple[AttentionEdit, PromptRows]


@dataclass
class Watch:
    """One stage's layers under observation: the last for what the next stage needs; those with edits, too."""

    layers: range
    decisions: Decisions
    upcoming: list[ImageRun]
    """Images to score under the last layer for the next stage."""
    adaptive: list[tuple[PrunedPrefill, PromptRows, list[int]]]
    """Adaptive prompts, their rows in this stage, and their images to decide about under the last layer."""
    bounds: dict[Key, int]
    scores: Scores = field(default_factory=dict)
    seconds: float = 0.0
    """Spent on signals and verdicts, by the host's clock."""
    verdicts: list[tuple[Key, Verdict]] = field(default_factory=list)

    @classmethod
    def of(cls, step: StagedStep, stage: int, layers: range, decisions: Decisions) -> "Watch":
        """What the prompts of a step need of a stage."""
        is_last = stage + 1 == len(step.stages)
        upcoming = [] if is_last else scored_before(step, stage + 1)
        adaptive = [
            (p, prompt_rows(step, stage, p), [] if is_last else decisions.pending(p.index, layers.stop))
            for p in step.prefills
            if p.plan.adaptive
        ]
        bounds = {(p.index, image): p.plan.kept[stage + 1][image] for p, _, images in adaptive for image in images}
        return cls(layers, decisions, upcoming, adaptive, bounds)

    def looks_at(self, layer: int) -> bool:
        """Whether :meth:`observe` must see this layer's Q, K and V."""
        return layer == self.layers[-1] and bool(self.upcoming or self.bounds)

    def edits(self, layer: int) -> list[Edit]:
        """The edits of a layer's attention, one per prompt."""
        found = ((self._decider(prefill).edit(layer), rows) for prefill, rows, _ in self.adaptive)
        return [(edit, rows) for edit, rows in found if edit is not None]

    @staticmethod
    def _decider(prefill: PrunedPrefill) -> Decider:
        assert isinstance(prefill.chooser, Decider)
        return prefill.chooser

    def observe(self, attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Score and judge by the last layer's Q [T, H * D], K and V [T, G * D]; see ``forward.Observer``."""
        start = perf_counter()
        self.scores.update(attention_to(self.upcoming, attention, query, key))
        for prefill, rows, images in self.adaptive:
            if images:
                self._judge(prefill, rows, images, _statistics(prefill, rows, attention, query, key, value))
        self.seconds += perf_counter() - start

    def _judge(
        self, prefill: PrunedPrefill, rows: PromptRows, images: list[int], found: Contribution | TextAttention
    ) -> None:
        for image in images:
            first, length = rows.images[image]
            own = type(found)(*(part[first : first + length] for part in found))
            place = prefill.index, image
            verdict = self.decisions.judge(place, self.layers.stop, self.bounds[place], own)
            self.verdicts.append((place, verdict))

    def settle(self) -> Scores:
        """Act on the verdicts; return the scores."""
        start = perf_counter()
        self.decisions.take(self.verdicts)
        self.seconds += perf_counter() - start
        return self.scores


def _statistics(
    prefill: PrunedPrefill,
    rows: PromptRows,
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> Contribution | TextAttention:
    """The signal of all of a prompt's rows that its method asks for."""
    shape = attention.num_heads, attention.num_kv_heads, attention.impl.scale
    here = slice(rows.first, rows.end)
    if prefill.chooser.signal is Signal.CONTRIBUTION:
        return contribution(query[rows.end - 1], key[here], value[here], *shape, sum_over_ranks)
    text = rows.text_after_images()
    return text_attention(query[here][text.to(query.device)], key[here], text, *shape, mean_over_ranks)


def edit_output(
    edits: list[Edit], attention: Any, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], output: torch.Tensor
) -> None:
    """Edit an attention module's output [T, H * D] in place, given its Q, K and V."""
    query, key, value = (part.unflatten(-1, (-1, attention.head_size)) for part in inputs)
    blind = [rows.vision_rows() for edit, rows in edits if edit.vision_is_blind and not edit.renormalise]
    if blind:
        index = torch.cat(blind).to(query.device)
        output[index] = attend_without(attention, query, key, value, index).flatten(1)[index]
    for edit, rows in edits:
        here = slice(rows.first, rows.end)
        heads = Heads(query[here], key[here], value[here], attention.impl.scale)
        for index, edited in edited_rows(edit, heads, rows.images):
            output[index + rows.first] = edited.flatten(1)


def attend_without(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """The layer's attention once more, [T, H, D], as if the values of the rows ``hidden`` were zero.

    The platform's kernel reads K and V from the cache, so the zeros are written there and the values put back.
    """
    context = get_forward_context()
    metadata, slots = (by_layer[attention.layer_name] for by_layer in (context.attn_metadata, context.slot_mapping))
    cache, attended = attention.kv_cache, torch.empty_like(query)
    attention.impl.do_kv_cache_update(attention, key, value.index_fill(0, hidden, 0), cache, slots)
    attention.impl.forward(attention, query, key, value, cache, metadata, attended)
    attention.impl.do_kv_cache_update(attention, key, value, cache, slots)
    return attended


def attention_to(
    runs: list[ImageRun], attention: Any, query: torch.Tensor, key: torch.Tensor
) -> dict[tuple[int, int], torch.Tensor]:
    """Attention of each request's last prompt row to its images that must choose, float32 [V] each, of all ranks."""
    result = {}
    by_request: dict[int, list[ImageRun]] = {}
    for run in runs:
        if run.selects:
            by_request.setdefault(run.prefill.index, []).append(run)
    for group in by_request.values():
        first, last = group[0].prompt_first_row, group[0].prompt_last_row
        read_keys, num_cached = group[0].prefill.read_keys, group[0].num_cached
        keys = key[first : last + 1]
        if read_keys is not None:
            keys = torch.cat((read_keys(attention, num_cached), keys))
        weights = row_attention(
            query[last],
            keys,
            attention.num_heads,
            attention.num_kv_heads,
            attention.impl.scale,
        )
        for run in group:
            start = run.first_row - first + num_cached
            result[run.key] = weights[start : start + run.num_rows]
    return dict(zip(result, means_over_ranks(list(result.values())), strict=True))
