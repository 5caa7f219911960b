"""The staged layer loop: every stage's layers on that stage's rows, cuts between them.

At a cut the first layer of the new stage computes Q, K and V of all current rows once, the method scores by them or by
what the last layer of the old stage saw, and the layer goes on with the Q, K, V and residual of the rows that stay:
nothing is projected twice. An injected row is the projector's output with residual 0. A decoder layer has the standard
form: norm, attention, norm, MLP on vLLM's residual pair.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

from vllm_hidrop.methods.scoring import Signals, Statistic, select_top
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.plan.signal import Under
from vllm_hidrop.staged.explain import Patches, patches_run
from vllm_hidrop.staged.image_runs import (
    ImageRun,
    Key,
    ScoredPrompt,
    Selections,
    after_injection,
    full_row,
    gather_index,
    image_runs,
    scored_behind,
    scored_under,
)
from vllm_hidrop.staged.norm import add_norm, can_fuse, fused_add_norm
from vllm_hidrop.staged.position_ids import PersistentIds
from vllm_hidrop.staged.rows import Rows, carry_in, keep_states, scatter
from vllm_hidrop.staged.signals import SIGNALS
from vllm_hidrop.staged.step import StagedStep, Survivors

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query [T, H * D], key and value [T, G * D] of one layer's attention, after RoPE."""
Observer = Callable[[Any, QKV], QKV | None]
"""(attention module, its Q, K and V) -> those to attend with, or None for the same."""
Editor = Callable[[Any, QKV, torch.Tensor], None]
"""(attention module, its Q, K and V, its output [T, H * D]): changes the output in place."""
Enter = Callable[[StagedStep, int], None]
"""(step, stage): called before a stage runs with other rows than were laid out for it."""


@dataclass(frozen=True)
class Decoder:
    """What the loop runs.

    Attributes:
        layers: the decoder layers, in order.
        norm: the final norm of (hidden, residual).
        schedule: the server's stages.
        ids: which RoPE ids rows have from a cut on.
    """

    layers: Sequence[nn.Module]
    norm: nn.Module
    schedule: Schedule
    ids: PersistentIds


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


class StagedLoop:
    """One step that prefills pruned prompts, run through all layers.

    Args:
        decoder: see :class:`Decoder`.
        step: the step's layout.
        embeds: [T, C], input embeddings of the full rows, projector outputs at the vision rows.
        positions: int64 [T + T_carried], RoPE positions of the full rows and the carried ones.
    """

    def __init__(self, decoder: Decoder, step: StagedStep, embeds: torch.Tensor, positions: torch.Tensor) -> None:
        self.decoder = decoder
        self.add_norm = fused_add_norm if can_fuse(decoder.norm) else add_norm
        self.step = step
        self.embeds, self.positions = embeds, positions
        self.full_rows = torch.arange(len(embeds), device=embeds.device)
        self.rows = Rows(embeds, None, self.full_rows, positions[: len(embeds)])
        self.statistics: dict[Key, Statistic] = {}
        """Per image, the signal that its method scores by at the next cut."""
        self.selection_seconds = 0.0

    def run(self) -> Outcome:
        """Run all stages."""
        states: dict[str, torch.Tensor] = {}
        ran: list[torch.Tensor] = []
        for stage, layers in enumerate(self.decoder.schedule.layer_ranges):
            self.begin(stage)
            carry_in(self.rows, self.step, stage, self.positions)
            states |= keep_states(self.rows, self.step, stage)
            runs = self.inject(image_runs(self.step, stage))
            scored_inside = scored_under(Under.NEXT_LAYER, runs)
            if not scored_inside:
                self.cut(stage, runs)
            for layer in layers:
                observe = self.observer(stage) if layer == layers[-1] else None
                if scored_inside and layer == layers[0]:
                    self.run_cut_layer(stage, runs, scored_inside, observe)
                else:
                    self.run_layer(layer, observe)
            ran.append(self.rows.full)
            self.end(stage)
        hidden, _ = self.add_norm(self.decoder.norm, self.rows.hidden, self.rows.residual)
        hidden = scatter(hidden, self.rows.full, len(self.positions))[: len(self.embeds)]
        patches = patches_run(self.step, ran)
        return Outcome(hidden, self.step, self.survivors(), states, patches, self.selection_seconds)

    def inject(self, runs: list[ImageRun]) -> list[ImageRun]:
        """Bring in the images that start here; return the runs that are left, in the new rows."""
        coming = [run for run in runs if run.injects]
        if not coming:
            return runs
        index = gather_index(self.step, coming, len(self.rows.hidden), {}, self.embeds.device)
        self.rows.extend(self.embeds, self.full_rows, self.positions[: len(self.embeds)])
        self.rows.gather(index)
        return after_injection(runs)

    def cut(self, stage: int, runs: list[ImageRun]) -> torch.Tensor | None:
        """Go on with the rows that the stage runs; return their index in those before, int64 [T'], None: all."""
        kept = None
        if runs:
            with self.timed():
                selections: Selections = {run.key: self.select(stage, run) for run in runs if run.selects}
                kept = gather_index(self.step, runs, len(self.rows.hidden), selections, self.embeds.device)
                self.rows.gather(kept)
                self.statistics = {}
        assert len(self.rows.full) == self.step.stages[stage].num_tokens, "rows differ from the plan"
        self.rows.ids = self.decoder.ids.after_cut(self.rows.ids, self.step, stage, runs)
        return kept

    def select(self, stage: int, run: ImageRun) -> Any:
        """The rows of an image that stay, int64 [keep], counted from its first row."""
        prefill = run.prompt.prefill
        survivors = self.rows.full[run.first_row : run.first_row + run.num_rows]
        survivors = survivors - full_row(self.step, prefill, run.image)
        layer = self.decoder.schedule.stages[stage].first_layer
        size = prefill.plan.spans[run.image].length
        signals = Signals(layer, run.keep, size, survivors, self.statistics.get(run.key))
        scores = prefill.method.score(signals)
        assert scores.shape == (run.num_rows,), "a score is one number per surviving token"
        return select_top(scores, run.keep)

    def run_cut_layer(
        self, stage: int, runs: list[ImageRun], scored: list[ScoredPrompt], observe: Observer | None
    ) -> None:
        """The first layer of a stage, shortened once its Q, K and V are there to score by."""
        index = self.decoder.schedule.stages[stage].first_layer
        layer: Any = self.decoder.layers[index]

        def shorten(attention: Any, qkv: QKV) -> QKV:
            self.compute_statistics(scored, attention, qkv)
            kept = self.cut(stage, runs)
            assert kept is not None
            shortened = *rotated.take(qkv[0], qkv[1], kept, self.rows.ids), qkv[2][kept]
            if observe is not None:
                observe(attention, shortened)
            return shortened

        with self.decoder.ids.rotating(layer.self_attn.rotary_emb) as rotated:
            self.run_layer(index, shorten)

    def run_layer(self, index: int, observe: Observer | None) -> None:
        """One decoder layer; ``observe`` may shorten the rows at its attention."""
        layer: Any = self.decoder.layers[index]
        rows = self.rows
        normed, rows.residual = self.add_norm(layer.input_layernorm, rows.hidden, rows.residual)
        rows.hidden = normed
        with hooked(layer.self_attn.attn, observe, self.editor(index)):
            attended = layer.self_attn(positions=rows.ids, hidden_states=normed)
        normed, rows.residual = self.add_norm(layer.post_attention_layernorm, attended, rows.residual)
        rows.hidden = layer.mlp(normed)

    def observer(self, stage: int) -> Observer | None:
        """What looks at the last layer of a stage for the cut behind it; None where nobody asks."""
        scored = self.scored_behind(stage) if stage + 1 < len(self.step.stages) else []
        return partial(self.compute_statistics, scored) if scored else None

    def compute_statistics(self, scored: list[ScoredPrompt], attention: Any, qkv: QKV) -> None:
        """The signals of some prompts' images in one layer."""
        with self.timed():
            for prompt, images in scored:
                whole = SIGNALS[prompt.prefill.method.signal](prompt.attention(attention, *qkv))
                num_tokens = prompt.places.count(prompt.prefill.plan.num_prompt_tokens)
                assert all(len(part) == num_tokens for part in whole), "a statistic is of every token of the stage"
                for image in images:
                    here = prompt.places.images[image]
                    own = type(whole)(*(part[here.offset : here.end] for part in whole))
                    self.statistics[prompt.prefill.index, image] = own

    @contextmanager
    def timed(self) -> Iterator[None]:
        """While entered, time counts as spent on selection."""
        start = perf_counter()
        yield
        self.selection_seconds += perf_counter() - start

    # What a loop with adaptive prompts has more to do.

    def begin(self, stage: int) -> None:
        """Before a stage."""

    def end(self, stage: int) -> None:
        """After a stage."""

    def scored_behind(self, stage: int) -> list[ScoredPrompt]:
        """Whom the last layer of a stage is to score."""
        return scored_behind(self.step, stage)

    def editor(self, layer: int) -> Editor | None:
        """What edits the attention of a layer: nothing."""
        return None

    def survivors(self) -> dict[str, Survivors]:
        """By request id, what was decided."""
        return {}


@contextmanager
def hooked(attention: nn.Module, observe: Observer | None, edit: Editor | None) -> Iterator[None]:
    """While entered, an attention module's Q, K and V are observed, and its output is edited."""
    handles = []
    if observe is not None:
        handles.append(attention.register_forward_pre_hook(observe))
    if edit is not None:
        handles.append(attention.register_forward_hook(edit))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
