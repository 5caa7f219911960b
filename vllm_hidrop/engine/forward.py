"""The staged layer loop: each stage's layers on that stage's rows, cuts between them.

Knows a decoder layer's standard form (norm, attention, norm, MLP on a residual pair); not which model it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_hidrop.engine.batch import StagedStep, Survivors
from vllm_hidrop.engine.decisions import Decisions
from vllm_hidrop.engine.explain import Patches, patches_run
from vllm_hidrop.engine.layout import ImageRun, Selections, after_injection, gather_index, image_runs
from vllm_hidrop.engine.norm import add_norm, can_fuse, fused_add_norm
from vllm_hidrop.engine.watch import Edit, Scores, Watch, attention_to, edit_output
from vllm_hidrop.pruning import Schedule
from vllm_hidrop.scoring import Signals, select_top

AttentionInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Observer = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], AttentionInputs | None]
"""(attention module, query [T, H * D], key and value [T, G * D]) -> what to attend with, or None for the same."""
Enter = Callable[[StagedStep, int], None]
"""(step, stage): called before a stage runs with other rows than were laid out for it."""


@dataclass
class Rows:
    """The current rows: vLLM's residual pair, and which of the step's full rows they are."""

    hidden: torch.Tensor
    residual: torch.Tensor | None
    full: torch.Tensor
    """int64 [T], indices into the step's full rows and, after them, the carried ones."""

    def gather(self, index: torch.Tensor) -> None:
        """Keep the rows at ``index``, int64 [T']."""
        self.hidden = self.hidden[index]
        self.residual = None if self.residual is None else self.residual[index]
        self.full = self.full[index]


@dataclass(frozen=True)
class Outcome:
    """What a staged step came to.

    Attributes:
        hidden: [T, C], final hidden states; rows that the last stage does not hold are zero.
        step: the step with the counts it ran with.
        survivors: by request id, what was decided about the adaptive prompts.
        states: by request id, the hidden states [n, C] that were to be kept.
        patches: by request id, what every stage ran with, of the prompts that ask.
        selection_seconds: spent on signals and selections, by the host's clock.
    """

    hidden: torch.Tensor
    step: StagedStep
    survivors: dict[str, Survivors]
    states: dict[str, torch.Tensor]
    patches: dict[str, Patches]
    selection_seconds: float


class StagedForward:
    """Runs a step that prefills pruned prompts.

    At a cut the first layer of the new stage computes Q, K and V of all current rows once, the scorer reads Q and K,
    and the layer goes on with the gathered Q, K, V and residual: nothing is projected twice. An injected row is the
    projector's output with residual 0. Rows keep the positions they are given throughout. What an adaptive method
    decides under the last layer of a stage shortens the rows before the next one.

    Args:
        layers: the decoder layers, in order.
        norm: the final norm of (hidden, residual).
        schedule: the server's stages.
    """

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module, schedule: Schedule) -> None:
        self.layers = layers
        self.norm = norm
        self.schedule = schedule
        self.add_norm = fused_add_norm if can_fuse(norm) else add_norm

    def __call__(self, step: StagedStep, embeds: torch.Tensor, positions: torch.Tensor, enter: Enter) -> Outcome:
        """Run all layers.

        Args:
            step: the step's layout.
            embeds: [T, C], input embeddings of the full rows, projector outputs at the vision rows.
            positions: int64 [T + T_carried], RoPE positions of the full rows and the carried ones.
            enter: see :data:`Enter`.
        """
        rows = Rows(embeds, None, torch.arange(embeds.shape[0], device=embeds.device))
        decisions = Decisions(step)
        scores: Scores = {}
        states: dict[str, torch.Tensor] = {}
        ran: list[torch.Tensor] = []
        seconds = 0.0
        for stage, laid_out in enumerate(step.stages):
            step = decisions.enter(step, stage)
            if step.stages[stage] is not laid_out:
                enter(step, stage)
            carry_in(rows, step, stage)
            states |= keep_states(rows, step, stage)
            layers = range(self.schedule.stages[stage].first_layer, self.schedule.end_layers[stage])
            runs = self._inject(rows, image_runs(step, stage), embeds)
            watch = Watch.of(step, stage, layers, decisions)
            if any(run.cuts_inside for run in runs):
                self._run_cut_layer(rows, runs, positions, scores, watch)
                layers = layers[1:]
            elif runs:
                self._cut(rows, runs, positions, scores, watch)
            assert rows.hidden.shape[0] == step.stages[stage].num_tokens, "rows differ from the plan"
            here = positions[rows.full]
            for index in layers:
                self._run_layer(index, rows, here, watch.observe if watch.looks_at(index) else None, watch.edits(index))
            scores = watch.settle()
            seconds += watch.seconds
            ran.append(rows.full)
        hidden, _ = self.add_norm(self.norm, rows.hidden, rows.residual)
        scattered = _scatter(hidden, rows.full, len(positions))[: embeds.shape[0]]
        return Outcome(scattered, step, decisions.survivors(), states, patches_run(step, ran), seconds)

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

    def _run_cut_layer(
        self, rows: Rows, runs: list[ImageRun], positions: torch.Tensor, scores: Scores, watch: Watch
    ) -> None:
        """The first layer of a stage, shortened once its Q, K and V are there to score by."""
        index = watch.layers[0]
        inside = [run for run in runs if run.cuts_inside]

        def select(attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> AttentionInputs:
            start = perf_counter()
            found = scores | attention_to(inside, attention, query, key)
            watch.seconds += perf_counter() - start
            kept = self._cut(rows, runs, positions, found, watch)
            shortened = query[kept], key[kept], value[kept]
            if watch.looks_at(index):
                watch.observe(attention, *shortened)
            return shortened

        self._run_layer(index, rows, positions[rows.full], select, watch.edits(index))

    def _cut(
        self, rows: Rows, runs: list[ImageRun], positions: torch.Tensor, scores: Scores, watch: Watch
    ) -> torch.Tensor:
        start = perf_counter()
        kept = self._select(rows, runs, scores, watch)
        watch.seconds += perf_counter() - start
        self._shorten(rows, runs, kept, positions)
        return kept

    def _shorten(self, rows: Rows, runs: list[ImageRun], kept: torch.Tensor, positions: torch.Tensor) -> None:
        """Go on with the rows that a change of stage left."""
        rows.gather(kept)

    def _run_layer(
        self, index: int, rows: Rows, here: torch.Tensor, observer: Observer | None, edits: list[Edit]
    ) -> None:
        """One decoder layer in the standard form; ``observer`` may shorten ``rows`` at its attention."""
        layer: Any = self.layers[index]
        normed, rows.residual = self.add_norm(layer.input_layernorm, rows.hidden, rows.residual)
        rows.hidden = normed
        with _Hooked(layer.self_attn.attn, observer, edits):
            attended = layer.self_attn(positions=here, hidden_states=normed)
        normed, rows.residual = self.add_norm(layer.post_attention_layernorm, attended, rows.residual)
        rows.hidden = layer.mlp(normed)

    def _select(self, rows: Rows, runs: list[ImageRun], scores: Scores, watch: Watch) -> torch.Tensor:
        """Choose in every image that must shrink; return the index of the rows that stay."""
        selections: Selections = {
            run.key: watch.decisions.selection(run.key)
            if run.prefill.plan.adaptive
            else self._select_top(rows, run, watch.layers[0], scores.get(run.key))
            for run in runs
            if run.selects
        }
        return gather_index(runs, rows.hidden.shape[0], selections, rows.hidden.device)

    def _select_top(self, rows: Rows, run: ImageRun, layer: int, attention: torch.Tensor | None) -> torch.Tensor:
        survivors = rows.full[run.first_row : run.first_row + run.num_rows] - run.full_first_row
        size = run.prefill.plan.spans[run.image].length
        signals = Signals(layer, run.keep, size, survivors, attention)
        return select_top(run.prefill.chooser.score(signals), run.keep)


class _Hooked:
    """While entered, ``observer`` sees an attention module's Q, K and V, and may replace them; its output is edited."""

    def __init__(self, attention: nn.Module, observer: Observer | None, edits: list[Edit]) -> None:
        self.attention = attention
        self.observer = observer
        self.edits = edits

    def __enter__(self) -> None:
        self.handles = []
        if self.observer is not None:
            self.handles.append(self.attention.register_forward_pre_hook(self._observe))
        if self.edits:
            self.handles.append(self.attention.register_forward_hook(self._edit))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _observe(self, attention: nn.Module, inputs: AttentionInputs) -> AttentionInputs | None:
        assert self.observer is not None
        return self.observer(attention, *inputs)

    def _edit(self, attention: nn.Module, inputs: AttentionInputs, output: torch.Tensor) -> None:
        edit_output(self.edits, attention, inputs, output)


def carry_in(rows: Rows, step: StagedStep, stage: int) -> None:
    """Put the carried states of the prompts whose first cut is ``stage`` before their rows."""
    carrying = step.carrying(stage)
    if not carrying:
        return
    assert rows.residual is not None, "no layer runs before the first one"
    pieces, cursor, end = [], 0, len(rows.full)
    for prefill in carrying:
        first, num_rows = int(step.stages[stage - 1].row_starts[prefill.index]), len(prefill.carried)
        pieces += [np.arange(cursor, first), np.arange(end, end + num_rows)]
        cursor, end = first, end + num_rows
    pieces.append(np.arange(cursor, len(rows.full)))
    states = torch.cat([prefill.carried for prefill in carrying])
    numbers = [np.arange(len(p.carried)) + step.first_carried[p.index] for p in carrying]
    rows.hidden = torch.cat((rows.hidden, states))
    rows.residual = torch.cat((rows.residual, torch.zeros_like(states)))
    rows.full = torch.cat((rows.full, torch.from_numpy(np.concatenate(numbers)).to(rows.full.device)))
    rows.gather(torch.from_numpy(np.concatenate(pieces)).to(rows.full.device))


def keep_states(rows: Rows, step: StagedStep, stage: int) -> dict[str, torch.Tensor]:
    """The states of prompts whose first cut is ``stage`` and which are to be kept.

    They are those from the last block boundary before the first image to the end of the last. These rows go on as
    those of a later prompt will: with the sum as hidden state, and residual 0.
    """
    keeping = [p for p in step.prefills if p.keeps_state and p.plan.first_cut == stage]
    if not keeping:
        return {}
    assert rows.residual is not None, "no layer runs before the first one"
    rows.hidden, rows.residual = rows.hidden.clone(), rows.residual.clone()
    starts = step.entering(stage).row_starts
    found = {}
    for prefill in keeping:
        plan, first = prefill.plan, int(starts[prefill.index])
        if prefill.carried is None:
            first += plan.carried_from - prefill.num_computed
        here = slice(first, first + plan.num_carried(plan.spans[-1].end))
        rows.hidden[here] += rows.residual[here]
        rows.residual[here] = 0
        found[prefill.request_id] = rows.hidden[here].clone()
    return found


def _scatter(hidden: torch.Tensor, full: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Put compact rows back in their places among the full rows."""
    if hidden.shape[0] == num_rows:
        return hidden
    return hidden.new_zeros(num_rows, hidden.shape[1]).index_copy_(0, full, hidden)
