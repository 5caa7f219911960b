"""The staged layer loop: each stage's layers on that stage's rows, cuts between them.

Knows a decoder layer's standard form (norm, attention, norm, MLP on a residual pair); not which model it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_hidrop.engine.batch import StagedStep
from vllm_hidrop.engine.layout import ImageRun, after_injection, gather_index, image_runs
from vllm_hidrop.engine.norm import add_norm, can_fuse, fused_add_norm
from vllm_hidrop.engine.signals import row_attention
from vllm_hidrop.pruning import Schedule
from vllm_hidrop.scoring import Scorer, Signal, Signals, select_top

AttentionInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Observer = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], AttentionInputs | None]
"""(attention module, query [T, H * D], key and value [T, G * D]) -> what to attend with, or None for the same."""


@dataclass
class Rows:
    """The current rows: vLLM's residual pair, and which of the step's full rows they are."""

    hidden: torch.Tensor
    residual: torch.Tensor | None
    full: torch.Tensor
    """int64 [T], indices into the step's full rows."""

    def gather(self, index: torch.Tensor) -> None:
        """Keep the rows at ``index``, int64 [T']."""
        self.hidden = self.hidden[index]
        self.residual = None if self.residual is None else self.residual[index]
        self.full = self.full[index]


class StagedForward:
    """Runs a step that prefills pruned prompts.

    At a cut the first layer of the new stage computes Q, K and V of all current rows once, the scorer reads Q and K,
    and the layer goes on with the gathered Q, K, V and residual: nothing is projected twice. An injected row is the
    projector's output with residual 0. Rows keep the positions they are given throughout.

    Args:
        layers: the decoder layers, in order.
        norm: the final norm of (hidden, residual).
        schedule: the server's stages.
        signal: what the scorer needs.
        scorer: scores one image's survivors.
    """

    def __init__(
        self, layers: Sequence[nn.Module], norm: nn.Module, schedule: Schedule, signal: Signal, scorer: Scorer
    ) -> None:
        self.layers = layers
        self.norm = norm
        self.schedule = schedule
        self.signal = signal
        self.scorer = scorer
        self.add_norm = fused_add_norm if can_fuse(norm) else add_norm

    def __call__(self, step: StagedStep, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run all layers.

        Args:
            step: the step's layout.
            embeds: [T, C], input embeddings of the full rows, projector outputs at the vision rows.
            positions: int64 [T], RoPE positions of the full rows.

        Returns:
            [T, C], final hidden states; rows that the last stage does not hold are zero.
        """
        rows = Rows(embeds, None, torch.arange(embeds.shape[0], device=embeds.device))
        scores: dict[tuple[int, int], torch.Tensor] = {}
        for stage, batch in enumerate(step.stages):
            first, end = self.schedule.stages[stage].first_layer, self.schedule.end_layers[stage]
            runs = self._inject(rows, image_runs(step, stage), embeds)
            if self._cuts_inside(runs):
                self._run_cut_layer(first, rows, runs, positions)
                first += 1
            elif runs:
                self._shorten(rows, runs, self._select(rows, runs, first, scores), positions)
            assert rows.hidden.shape[0] == batch.num_tokens, "rows differ from the plan"
            scores = self._run_layers(first, end, rows, positions, self._upcoming(step, stage))
        hidden, _ = self.add_norm(self.norm, rows.hidden, rows.residual)
        return _scatter(hidden, rows.full, embeds.shape[0])

    def _cuts_inside(self, runs: list[ImageRun]) -> bool:
        return self.signal is Signal.NEXT_ATTENTION and any(run.selects for run in runs)

    def _upcoming(self, step: StagedStep, stage: int) -> list[ImageRun]:
        """Images to score under the last layer of this stage, for the next one."""
        if self.signal is not Signal.PREVIOUS_ATTENTION or stage + 1 == len(step.stages):
            return []
        return [run for run in image_runs(step, stage + 1) if run.selects]

    def _inject(self, rows: Rows, runs: list[ImageRun], embeds: torch.Tensor) -> list[ImageRun]:
        """Bring in the images that start here; return the runs that are left, in the new rows."""
        coming = [run for run in runs if run.injects]
        if not coming:
            return runs
        index = gather_index(coming, rows.hidden.shape[0], {}, embeds.device)
        full_rows = torch.arange(embeds.shape[0], device=embeds.device)
        assert rows.residual is not None, "a layer has run before any injection"
        rows.hidden = torch.cat((rows.hidden, embeds))[index]
        rows.residual = torch.cat((rows.residual, torch.zeros_like(embeds)))[index]
        rows.full = torch.cat((rows.full, full_rows))[index]
        return after_injection(runs)

    def _run_layers(
        self, first: int, end: int, rows: Rows, positions: torch.Tensor, upcoming: list[ImageRun]
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Run layers on unchanging rows; return the attention of the last one to the images named in ``upcoming``."""
        scores: dict[tuple[int, int], torch.Tensor] = {}
        if first == end:
            assert not upcoming, "a stage of one layer is its own cut layer"
            return scores
        here = positions[rows.full]

        def observe(attention: Any, query: torch.Tensor, key: torch.Tensor, _: torch.Tensor) -> None:
            scores.update(attention_to(upcoming, attention, query, key))

        for index in range(first, end - 1):
            self._run_layer(index, rows, here, None)
        self._run_layer(end - 1, rows, here, observe if upcoming else None)
        return scores

    def _run_cut_layer(self, index: int, rows: Rows, runs: list[ImageRun], positions: torch.Tensor) -> None:
        def select(attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> AttentionInputs:
            kept = self._select(rows, runs, index, attention_to(runs, attention, query, key))
            self._shorten(rows, runs, kept, positions)
            return query[kept], key[kept], value[kept]

        self._run_layer(index, rows, positions[rows.full], select)

    def _shorten(self, rows: Rows, runs: list[ImageRun], kept: torch.Tensor, positions: torch.Tensor) -> None:
        """Go on with the rows that a change of stage left."""
        rows.gather(kept)

    def _run_layer(self, index: int, rows: Rows, here: torch.Tensor, observer: Observer | None) -> None:
        """One decoder layer in the standard form; ``observer`` may shorten ``rows`` at its attention."""
        layer: Any = self.layers[index]
        normed, rows.residual = self.add_norm(layer.input_layernorm, rows.hidden, rows.residual)
        rows.hidden = normed
        with _Observed(layer.self_attn.attn, observer):
            attended = layer.self_attn(positions=here, hidden_states=normed)
        normed, rows.residual = self.add_norm(layer.post_attention_layernorm, attended, rows.residual)
        rows.hidden = layer.mlp(normed)

    def _select(
        self, rows: Rows, runs: list[ImageRun], layer: int, attention: dict[tuple[int, int], torch.Tensor]
    ) -> torch.Tensor:
        """Score every image that must choose; return the index of the rows that stay."""
        selections = {}
        for run in runs:
            if run.selects:
                survivors = rows.full[run.first_row : run.first_row + run.num_rows] - run.full_first_row
                size = run.prefill.plan.spans[run.image].length
                signals = Signals(layer, run.keep, size, survivors, attention.get(run.key))
                selections[run.key] = select_top(self.scorer(signals), run.keep)
        return gather_index(runs, rows.hidden.shape[0], selections, rows.hidden.device)


class _Observed:
    """While entered, ``observer`` sees an attention module's Q, K (after RoPE) and V and may replace them."""

    def __init__(self, attention: nn.Module, observer: Observer | None) -> None:
        self.attention = attention
        self.observer = observer

    def __enter__(self) -> None:
        if self.observer is not None:
            self.handle = self.attention.register_forward_pre_hook(self._observe)

    def __exit__(self, *_: object) -> None:
        if self.observer is not None:
            self.handle.remove()

    def _observe(self, attention: nn.Module, inputs: AttentionInputs) -> AttentionInputs | None:
        assert self.observer is not None
        return self.observer(attention, *inputs)


def attention_to(
    runs: list[ImageRun], attention: Any, query: torch.Tensor, key: torch.Tensor
) -> dict[tuple[int, int], torch.Tensor]:
    """Attention of each request's last prompt row to its images that must choose, float32 [V] each."""
    result = {}
    by_request: dict[int, list[ImageRun]] = {}
    for run in runs:
        if run.selects:
            by_request.setdefault(run.prefill.index, []).append(run)
    for group in by_request.values():
        first, last = group[0].prompt_first_row, group[0].prompt_last_row
        weights = row_attention(
            query[last],
            key[first : last + 1],
            attention.num_heads,
            attention.num_kv_heads,
            attention.impl.scale,
        )
        for run in group:
            start = run.first_row - first
            result[run.key] = weights[start : start + run.num_rows]
    return result


def _scatter(hidden: torch.Tensor, full: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Put compact rows back in their places among the full rows."""
    if hidden.shape[0] == num_rows:
        return hidden
    return hidden.new_zeros(num_rows, hidden.shape[1]).index_copy_(0, full, hidden)
