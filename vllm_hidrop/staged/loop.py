"""The staged loop: every stage's layers on that stage's rows, cuts between them.

Where a signal is under the next layer, the first layer of the new stage computes Q, K and V of all current rows, the
method scores, and the layer goes on with the Q, K, V and residual of the rows that stay (standard form), or runs once
more on those rows (black box). Else the rows are cut before that layer, by the last layer of the old stage. An injected
row is the projector's output, and what the skipped layers' levels add to it, with residual 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_hidrop.methods.scoring import Signals, Statistic
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.plan.signal import Signal, Under
from vllm_hidrop.staged.explain import Patches, patches_run
from vllm_hidrop.staged.image_runs import (
    ImageRun,
    Key,
    PromptRows,
    ScoredPrompt,
    after_injection,
    gather_index,
    image_places,
    image_runs,
    scored_behind,
    scored_under,
)
from vllm_hidrop.staged.layers import FORMS, QKV, BlackBoxLayers, Editor, Layers, Observer
from vllm_hidrop.staged.levels import Levels, embeds_before, with_carried
from vllm_hidrop.staged.position_ids import PersistentIds
from vllm_hidrop.staged.rows import Rows, carry_in, keep_states, scatter
from vllm_hidrop.staged.selection import select_rows
from vllm_hidrop.staged.signals import SIGNALS
from vllm_hidrop.staged.step import StagedStep, Survivors
from vllm_hidrop.staged.timer import Timer

Enter = Callable[[StagedStep, int], None]
"""(step, stage): called before a stage runs fewer rows than its slots and attention metadata were made for."""


@dataclass(frozen=True)
class Decoder:
    """A model's decoder ``layers``, the final ``norm`` and the server's ``schedule`` and rule for RoPE ids at cuts."""

    layers: Sequence[nn.Module]
    norm: nn.Module
    schedule: Schedule
    ids: PersistentIds
    form: Form = Form.STANDARD

    @cached_property
    def runnable(self) -> Layers:
        """The layers and the norm in their form."""
        return FORMS[self.form](self.layers, self.norm)


@dataclass(frozen=True)
class Outcome:
    """Everything that a staged step returns.

    Attributes:
        hidden: [T, C], final hidden states; rows that the last stage does not hold are zero.
        step: the step with the counts that ran.
        survivors: by request id, of the adaptive prompts.
        states: by request id, the hidden states [n, C] that the worker keeps for later prompts.
        patches: by request id, the vision tokens that every stage ran, for the requests that ask.
        selecting: the time spent on signals and selections.
    """

    hidden: torch.Tensor
    step: StagedStep
    survivors: dict[str, Survivors]
    states: dict[str, torch.Tensor]
    patches: dict[str, Patches]
    selecting: Timer


class StagedLoop:
    """One step that prefills pruned prompts, run through all layers.

    ``embeds`` [T, C] are input embeddings of the full rows, projector outputs at the vision rows, and ``levels`` what
    the model adds behind its first layers, [T, C] each; ``positions`` int64 [T + T_carried], or [3, T + T_carried], are
    RoPE ids of the full rows and, after them, the carried rows.
    """

    def __init__(
        self, decoder: Decoder, step: StagedStep, embeds: torch.Tensor, positions: torch.Tensor, levels: Levels = ()
    ) -> None:
        self.decoder = decoder
        self.layers = decoder.runnable
        self.step = step
        self.embeds, self.positions = embeds, positions
        self.levels = with_carried(levels, step)
        self.full_rows = torch.arange(len(embeds), device=embeds.device)
        self.rows = Rows(embeds, None, self.full_rows, positions[..., : len(embeds)])
        self.statistics: dict[Key, Statistic] = {}
        """Per image, the signal for the next cut."""
        self.selecting = Timer(embeds.device)

    def run(self) -> Outcome:
        """Run all stages."""
        states: dict[str, torch.Tensor] = {}
        rows_of_stages: list[torch.Tensor] = []
        for stage, layers in enumerate(self.decoder.schedule.layer_ranges):
            self.begin(stage)
            carry_in(self.rows, self.step, stage, self.positions)
            states |= keep_states(self.rows, self.step, stage, layers.start, self.levels)
            runs = self.inject(stage, image_runs(self.step, stage))
            scored_in_layer = scored_under(Under.NEXT_LAYER, runs)
            if not scored_in_layer:
                self.cut(stage, runs)
            for layer in layers:
                observe = self.observer(stage) if layer == layers[-1] else None
                if scored_in_layer and layer == layers[0]:
                    self.run_cut_layer(stage, runs, scored_in_layer, observe)
                else:
                    self.run_layer(layer, observe)
            rows_of_stages.append(self.rows.full)
            self.end(stage)
        hidden = scatter(self.layers.normed(self.rows), self.rows.full, self.positions.shape[-1])[: len(self.embeds)]
        patches = patches_run(self.step, rows_of_stages)
        return Outcome(hidden, self.step, self.survivors(), states, patches, self.selecting)

    def inject(self, stage: int, runs: list[ImageRun]) -> list[ImageRun]:
        """Inject images' rows from the projector's output; return the other runs, where their rows stand now."""
        injected = [run for run in runs if run.injects]
        if not injected:
            return runs
        index = gather_index(self.step, injected, len(self.rows.hidden), {}, None, self.embeds.device)
        embeds = embeds_before(self.embeds, self.levels, self.decoder.schedule.stages[stage].first_layer)
        self.rows.extend(embeds, self.full_rows, self.positions[..., : len(embeds)])
        self.rows.gather(index)
        return after_injection(runs)

    def cut(self, stage: int, runs: list[ImageRun]) -> torch.Tensor | None:
        """Keep the stage's rows; return their indices among the rows before, int64 [T'], or None where all stay."""
        kept = None
        if runs:
            with self.selecting.running():
                decided = self.decided(runs)
                scored = [run for run in runs if run.selects and run.key not in decided]
                selected = self.select(stage, scored) if scored else None
                kept = gather_index(self.step, runs, len(self.rows.hidden), decided, selected, self.embeds.device)
                self.rows.gather(kept)
                self.statistics = {}
        assert len(self.rows.full) == self.step.stages[stage].num_tokens, "rows differ from the plan"
        self.rows.ids = self.decoder.ids.after_cut(self.rows.ids, self.step, stage, runs)
        return kept

    def select(self, stage: int, runs: list[ImageRun]) -> torch.Tensor:
        """The rows of these images that stay, in order, int64 [sum of keeps]."""
        places = self.places[self.rows.full]
        layer = self.decoder.schedule.stages[stage].first_layer
        scores = []
        for run in runs:
            size = run.prompt.prefill.plan.spans[run.image].length
            survivors = places[run.first_row : run.first_row + run.num_rows]
            signals = Signals(layer, run.keep, size, survivors, self.statistics.get(run.key))
            scores.append(run.prompt.prefill.method.score(signals))
            assert scores[-1].shape == (run.num_rows,), "a score is one number per surviving token"
        return select_rows(scores, [run.keep for run in runs], [run.first_row for run in runs])

    @cached_property
    def places(self) -> torch.Tensor:
        """The place inside its image of every full and carried row, int64."""
        return async_tensor_h2d(image_places(self.step, self.positions.shape[-1]), device=self.embeds.device)

    def run_cut_layer(
        self, stage: int, runs: list[ImageRun], scored: list[ScoredPrompt], observe: Observer | None
    ) -> None:
        """Run the first layer of a stage on all rows up to its Q, K and V, score by them, go on with the stage's rows.

        ``observe`` sees the Q, K and V of the stage's rows.
        """
        index = self.decoder.schedule.stages[stage].first_layer
        if isinstance(self.layers, BlackBoxLayers):
            self.layers.probe(index, self.rows, partial(self.compute_statistics, scored))
            self.cut(stage, runs)
            self.run_layer(index, observe)
            return
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
        """Run one decoder layer, and add its level; ``observe`` may shorten its rows once Q, K and V are computed."""
        self.layers.run(index, self.rows, observe, self.editor(index))
        if index < len(self.levels):
            self.rows.hidden = self.rows.hidden + self.levels[index][self.rows.full]

    def observer(self, stage: int) -> Observer | None:
        """What computes signals for the next cut under the last layer of a stage; None where no prompt needs any."""
        scored = self.scored_behind(stage) if stage + 1 < len(self.step.stages) else []
        return partial(self.compute_statistics, scored) if scored else None

    def compute_statistics(self, scored: list[ScoredPrompt], attention: Any, qkv: QKV) -> None:
        """Compute the signals of some prompts' images under one layer."""
        with self.selecting.running():
            by_signal: dict[Signal, list[ScoredPrompt]] = {}
            for each in scored:
                by_signal.setdefault(each[0].prefill.method.signal, []).append(each)
            for signal, alike in by_signal.items():
                found = SIGNALS[signal]([prompt.attention(attention, *qkv) for prompt, _ in alike])
                for (prompt, images), statistic in zip(alike, found, strict=True):
                    self._keep_statistic(prompt, images, statistic)

    def _keep_statistic(self, prompt: PromptRows, images: list[int], of_prompt: Statistic) -> None:
        num_tokens = prompt.places.count(prompt.prefill.plan.num_prompt_tokens)
        assert all(len(part) == num_tokens for part in of_prompt), "a statistic is of every token of the stage"
        for image in images:
            span = prompt.places.images[image]
            of_image = type(of_prompt)(*(part[span.offset : span.end] for part in of_prompt))
            self.statistics[prompt.prefill.index, image] = of_image

    # Hooks of the adaptive loop; see there.

    def begin(self, stage: int) -> None:
        """Called before a stage."""

    def end(self, stage: int) -> None:
        """Called after a stage."""

    def scored_behind(self, stage: int) -> list[ScoredPrompt]:
        """The prompts and images that the last layer of a stage scores."""
        return scored_behind(self.step, stage)

    def decided(self, runs: list[ImageRun]) -> dict[Key, npt.NDArray[np.int64]]:
        """The rows that stay of images whose method has decided already, int64 [keep], zero-based inside the image."""
        return {}

    def editor(self, layer: int) -> Editor | None:
        """The editor of a layer's attention output."""
        return None

    def survivors(self) -> dict[str, Survivors]:
        """By request id, the survivors of adaptive prompts."""
        return {}
