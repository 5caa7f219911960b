"""The staged loop for adaptive prompts: their method decides at cuts how many tokens stay, and may edit attention."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_hidrop.methods.adaptive import AttentionEdit
from vllm_hidrop.staged.adaptive import AdaptiveImages, decider
from vllm_hidrop.staged.attention_edits import Heads, edited_rows
from vllm_hidrop.staged.image_runs import ImageRun, Key, PromptRows, ScoredPrompt, prompt_rows
from vllm_hidrop.staged.layers import QKV, Editor
from vllm_hidrop.staged.levels import Levels
from vllm_hidrop.staged.loop import Decoder, Enter, Outcome, StagedLoop
from vllm_hidrop.staged.step import StagedStep, Survivors


def run_staged(
    decoder: Decoder,
    step: StagedStep,
    embeds: torch.Tensor,
    positions: torch.Tensor,
    enter: Enter,
    levels: Levels = (),
) -> Outcome:
    """Run a step that prefills pruned prompts; for the arguments see :class:`StagedLoop` and :data:`Enter`."""
    if any(prefill.plan.adaptive for prefill in step.prefills):
        return AdaptiveLoop(decoder, step, embeds, positions, enter, levels).run()
    return StagedLoop(decoder, step, embeds, positions, levels).run()


class AdaptiveLoop(StagedLoop):
    """A staged loop whose later stages shrink whenever a method keeps fewer tokens than the plan's upper bound.

    A method decides under the last layer of a stage; the next stage starts on the rows that stay.
    """

    def __init__(
        self,
        decoder: Decoder,
        step: StagedStep,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        enter: Enter,
        levels: Levels,
    ) -> None:
        super().__init__(decoder, step, embeds, positions, levels)
        self.enter = enter
        self.images = AdaptiveImages(step)
        self.laid_out = step.stages

    def begin(self, stage: int) -> None:
        """Shrink the stage to the decided counts; have its slots and metadata made anew where that changes it."""
        self.step = self.images.enter(self.step, stage)
        if self.step.stages[stage] is not self.laid_out[stage]:
            self.enter(self.step, stage)
        self.adaptive = [prompt for prompt in prompt_rows(self.step, stage) if prompt.prefill.plan.adaptive]

    def scored_behind(self, stage: int) -> list[ScoredPrompt]:
        """Plain prompts, and the images of adaptive prompts that their method decides about."""
        layer = self.decoder.schedule.end_layers[stage]
        plain = [each for each in super().scored_behind(stage) if not each[0].prefill.plan.adaptive]
        undecided = ((prompt, self.images.undecided(prompt.prefill.index, layer)) for prompt in self.adaptive)
        return plain + [each for each in undecided if each[1]]

    def end(self, stage: int) -> None:
        """Let methods decide about the images whose signals the stage's last layer computed."""
        statistics = {key: self.statistics.pop(key) for key in list(self.statistics) if key in self.images.images}
        if statistics:
            kept = {prompt.prefill.index: prompt.prefill.plan.kept[stage + 1] for prompt in self.adaptive}
            bounds = {(index, image): kept[index][image] for index, image in statistics}
            with self.selecting.running():
                self.images.decide(self.decoder.schedule.end_layers[stage], bounds, statistics)

    def decided(self, runs: list[ImageRun]) -> dict[Key, npt.NDArray[np.int64]]:
        """The rows that stay of the adaptive prompts' images."""
        adaptive = (run for run in runs if run.selects and run.prompt.prefill.plan.adaptive)
        return {run.key: self.images.selection(run.key) for run in adaptive}

    def editor(self, layer: int) -> Editor | None:
        """The edits of a layer's attention, one per prompt."""
        edits = ((decider(prompt.prefill).edit(layer), prompt) for prompt in self.adaptive)
        existing = [(edit, prompt) for edit, prompt in edits if edit is not None]
        return editor(existing) if existing else None

    def survivors(self) -> dict[str, Survivors]:
        """By request id, the survivors in every stage."""
        return self.images.survivors()


def editor(edits: list[tuple[AttentionEdit, PromptRows]]) -> Callable[[Any, QKV, torch.Tensor], None]:
    """The editor that applies each edit to its prompt's rows of an attention output."""
    blind = [prompt for edit, prompt in edits if edit.vision_is_blind and not edit.renormalise]

    def change(attention: Any, qkv: QKV, output: torch.Tensor) -> None:
        query, key, value = (part.unflatten(-1, (-1, attention.head_size)) for part in qkv)
        if blind:
            rows = [prompt.places.vision_places() + prompt.first_row for prompt in blind]
            index = async_tensor_h2d(np.concatenate(rows), device=query.device)
            output[index] = attend_without(attention, query, key, value, index).flatten(1)[index]
        for edit, prompt in edits:
            own = slice(prompt.first_row, prompt.end_row)
            images = [(image.offset, image.length) for image in prompt.places.images]
            heads = Heads(query[own], key[own], value[own], attention.impl.scale)
            for index, edited in edited_rows(edit, heads, images):
                output[index + prompt.first_row] = edited.flatten(1)

    return change


def attend_without(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, unseen: torch.Tensor
) -> torch.Tensor:
    """The layer's attention output once more, [T, H, D], as if the values of the rows ``unseen``, int64 [n], were zero.

    The platform's kernel reads K and V from the cache, so the zeros are written there and the values put back.
    """
    context = get_forward_context()
    metadata, slots = (by_layer[attention.layer_name] for by_layer in (context.attn_metadata, context.slot_mapping))
    cache, attended = attention.kv_cache, torch.empty_like(query)
    attention.impl.do_kv_cache_update(attention, key, value.index_fill(0, unseen, 0), cache, slots)
    attention.impl.forward(attention, query, key, value, cache, metadata, attended)
    attention.impl.do_kv_cache_update(attention, key, value, cache, slots)
    return attended
