"""The staged layer loop: each stage's layers on that stage's rows, cuts between them.

Knows a decoder layer's standard form (norm, attention, norm, MLP on a residual pair); not which model it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Self

import torch
from torch import nn

from vllm_hidrop.methods.scoring import Signals, select_top
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.staged.adaptive import Decisions
from vllm_hidrop.staged.attention_probe import Edit, Scores, Watch, attention_to, edit_output
from vllm_hidrop.staged.explain import Patches, patches_run
from vllm_hidrop.staged.image_runs import ImageRun, Selections, after_injection, gather_index, image_runs
from vllm_hidrop.staged.norm import add_norm, can_fuse, fused_add_norm
from vllm_hidrop.staged.rows import Rows, carry_in, keep_states, scatter
from vllm_hidrop.staged.step import StagedStep, Survivors

AttentionInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Observer = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], AttentionInputs | None]
"""(attention module, query [T, H * D], key and value [T, G * D]) -> what to attend with, or None for the same."""
Enter = Callable[[StagedStep, int], None]
"""(step, stage): called before a stage runs with other rows than were laid out for it."""


@dataclass(frozen=True)
class Entry:
    """What happens to the rows on entry to a stage.

    Attributes:
        step: with the counts known now.
        stage: its index.
        runs: the images that change, in the current rows; those that are injected have come in.
        scores: by the last layer of the stage before.
        watch: of the stage's layers.
    """

    step: StagedStep
    stage: int
    runs: list[ImageRun]
    scores: Scores
    watch: Watch


class Gathered:
    """How a cut layer takes the Q and K of the rows that stay: as they are.

    Args:
        rotary: the layer's rotary embedding.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def take(
        self, query: torch.Tensor, key: torch.Tensor, index: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query [T', H * D] and key [T', G * D] of the rows at ``index`` int64 [T'], which have these ids from here."""
        return query[index], key[index]


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
    projector's output with residual 0. Rows keep the ids they come with, unless a subclass numbers them anew. What an
    adaptive method decides under the last layer of a stage shortens the rows before the next one.

    Args:
        layers: the decoder layers, in order.
        norm: the final norm of (hidden, residual).
        schedule: the server's stages.
    """

    gathering: type[Gathered] = Gathered

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
        rows = Rows(embeds, None, torch.arange(embeds.shape[0], device=embeds.device), positions[: embeds.shape[0]])
        decisions = Decisions(step)
        scores: Scores = {}
        states: dict[str, torch.Tensor] = {}
        ran: list[torch.Tensor] = []
        seconds = 0.0
        for stage, laid_out in enumerate(step.stages):
            step = decisions.enter(step, stage)
            if step.stages[stage] is not laid_out:
                enter(step, stage)
            carry_in(rows, step, stage, positions)
            states |= keep_states(rows, step, stage)
            layers = range(self.schedule.stages[stage].first_layer, self.schedule.end_layers[stage])
            runs = self._inject(rows, image_runs(step, stage), embeds, positions)
            watch = Watch.of(step, stage, layers, decisions)
            entry = Entry(step, stage, runs, scores, watch)
            if any(run.cuts_inside for run in runs):
                self._run_cut_layer(rows, entry)
                layers = layers[1:]
            elif runs:
                self._cut(rows, entry)
            else:
                self._number(rows, entry)
            assert rows.hidden.shape[0] == step.stages[stage].num_tokens, "rows differ from the plan"
            for index in layers:
                self._run_layer(index, rows, watch.observe if watch.looks_at(index) else None, watch.edits(index))
            scores = watch.settle()
            seconds += watch.seconds
            ran.append(rows.full)
        hidden, _ = self.add_norm(self.norm, rows.hidden, rows.residual)
        scattered = scatter(hidden, rows.full, len(positions))[: embeds.shape[0]]
        return Outcome(scattered, step, decisions.survivors(), states, patches_run(step, ran), seconds)

    def _inject(
        self, rows: Rows, runs: list[ImageRun], embeds: torch.Tensor, positions: torch.Tensor
    ) -> list[ImageRun]:
        """Bring in the images that start here; return the runs that are left, in the new rows."""
        coming = [run for run in runs if run.injects]
        if not coming:
            return runs
        index = gather_index(coming, rows.hidden.shape[0], {}, embeds.device)
        full_rows = torch.arange(embeds.shape[0], device=embeds.device)
        rows.extend(embeds, full_rows, positions[: embeds.shape[0]])
        rows.gather(index)
        return after_injection(runs)

    def _run_cut_layer(self, rows: Rows, entry: Entry) -> None:
        """The first layer of a stage, shortened once its Q, K and V are there to score by."""
        watch = entry.watch
        index = watch.layers[0]
        layer: Any = self.layers[index]
        inside = [run for run in entry.runs if run.cuts_inside]

        def select(attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> AttentionInputs:
            start = perf_counter()
            found = entry.scores | attention_to(inside, attention, query, key)
            watch.seconds += perf_counter() - start
            kept = self._cut(rows, replace(entry, scores=found))
            shortened = *gathered.take(query, key, kept, rows.ids), value[kept]
            if watch.looks_at(index):
                watch.observe(attention, *shortened)
            return shortened

        with self.gathering(layer.self_attn.rotary_emb) as gathered:
            self._run_layer(index, rows, select, watch.edits(index))

    def _cut(self, rows: Rows, entry: Entry) -> torch.Tensor:
        """Go on with the rows that the stage runs; return their index in those before, int64 [T']."""
        start = perf_counter()
        kept = self._select(rows, entry)
        rows.gather(kept)
        entry.watch.seconds += perf_counter() - start
        self._number(rows, entry)
        return kept

    def _number(self, rows: Rows, entry: Entry) -> None:
        """Give the rows of a stage their ids: those they have."""

    def _run_layer(self, index: int, rows: Rows, observer: Observer | None, edits: list[Edit]) -> None:
        """One decoder layer in the standard form; ``observer`` may shorten ``rows`` at its attention."""
        layer: Any = self.layers[index]
        normed, rows.residual = self.add_norm(layer.input_layernorm, rows.hidden, rows.residual)
        rows.hidden = normed
        with _Hooked(layer.self_attn.attn, observer, edits):
            attended = layer.self_attn(positions=rows.ids, hidden_states=normed)
        normed, rows.residual = self.add_norm(layer.post_attention_layernorm, attended, rows.residual)
        rows.hidden = layer.mlp(normed)

    def _select(self, rows: Rows, entry: Entry) -> torch.Tensor:
        """Choose in every image that must shrink; return the index of the rows that stay."""
        watch = entry.watch
        selections: Selections = {
            run.key: watch.decisions.selection(run.key)
            if run.prefill.plan.adaptive
            else self._select_top(rows, run, watch.layers[0], entry.scores.get(run.key))
            for run in entry.runs
            if run.selects
        }
        return gather_index(entry.runs, rows.hidden.shape[0], selections, rows.hidden.device)

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
