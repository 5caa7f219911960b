"""The staged loop with prompts whose method decides, layer by layer, how many tokens stay, and edits attention."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.forward_context import get_forward_context

from vllm_hidrop.methods.adaptive import AttentionEdit
from vllm_hidrop.staged.adaptive import AdaptiveImages, decider
from vllm_hidrop.staged.attention_edits import Heads, edited_rows
from vllm_hidrop.staged.image_runs import ImageRun, PromptRows, ScoredPrompt, prompt_rows
from vllm_hidrop.staged.loop import QKV, Decoder, Editor, Enter, Outcome, StagedLoop
from vllm_hidrop.staged.step import StagedStep, Survivors


def run_staged(
    decoder: Decoder, step: StagedStep, embeds: torch.Tensor, positions: torch.Tensor, enter: Enter
) -> Outcome:
    """Run a step that prefills pruned prompts; see :class:`~vllm_hidrop.staged.loop.StagedLoop`.

    Args:
        decoder: the model's layers.
        step: the step's layout.
        embeds: [T, C], input embeddings of the full rows, projector outputs at the vision rows.
        positions: int64 [T + T_carried], RoPE positions of the full rows and the carried ones.
        enter: called before a stage runs with other rows than were laid out for it.
    """
    if any(prefill.plan.adaptive for prefill in step.prefills):
        return AdaptiveLoop(decoder, step, embeds, positions, enter).run()
    return StagedLoop(decoder, step, embeds, positions).run()


class AdaptiveLoop(StagedLoop):
    """A staged loop that is laid out anew whenever fewer tokens stay than its plans allow for.

    What a method decides under the last layer of a stage shortens the rows before the next one.
    """

    def __init__(
        self, decoder: Decoder, step: StagedStep, embeds: torch.Tensor, positions: torch.Tensor, enter: Enter
    ) -> None:
        super().__init__(decoder, step, embeds, positions)
        self.enter = enter
        self.images = AdaptiveImages(step)
        self.laid_out = step.stages

    def begin(self, stage: int) -> None:
        """Lay out the stage with the counts that are known now."""
        self.step = self.images.enter(self.step, stage)
        if self.step.stages[stage] is not self.laid_out[stage]:
            self.enter(self.step, stage)
        self.adaptive = [prompt for prompt in prompt_rows(self.step, stage) if prompt.prefill.plan.adaptive]

    def scored_behind(self, stage: int) -> list[ScoredPrompt]:
        """Also the images of adaptive prompts about which to decide."""
        layer = self.decoder.schedule.end_layers[stage]
        plain = [each for each in super().scored_behind(stage) if not each[0].prefill.plan.adaptive]
        undecided = ((prompt, self.images.undecided(prompt.prefill.index, layer)) for prompt in self.adaptive)
        return plain + [each for each in undecided if each[1]]

    def end(self, stage: int) -> None:
        """Decide."""
        found = {key: self.statistics.pop(key) for key in list(self.statistics) if key in self.images.images}
        if found:
            kept = {prompt.prefill.index: prompt.prefill.plan.kept[stage + 1] for prompt in self.adaptive}
            bounds = {(index, image): kept[index][image] for index, image in found}
            with self.timed():
                self.images.decide(self.decoder.schedule.end_layers[stage], bounds, found)

    def select(self, stage: int, run: ImageRun) -> Any:
        """Also what was decided, as int64 [keep] on the host."""
        return self.images.selection(run.key) if run.prompt.prefill.plan.adaptive else super().select(stage, run)

    def editor(self, layer: int) -> Editor | None:
        """The edits of a layer's attention, one per prompt."""
        edits = ((decider(prompt.prefill).edit(layer), prompt) for prompt in self.adaptive)
        found = [(edit, prompt) for edit, prompt in edits if edit is not None]
        return editor(found) if found else None

    def survivors(self) -> dict[str, Survivors]:
        """What every stage of the adaptive prompts ran with."""
        return self.images.survivors()


def editor(edits: list[tuple[AttentionEdit, PromptRows]]) -> Callable[[Any, QKV, torch.Tensor], None]:
    """What edits an attention module's output [T, H * D] in place, given its Q, K and V."""
    blind = [prompt for edit, prompt in edits if edit.vision_is_blind and not edit.renormalise]

    def change(attention: Any, qkv: QKV, output: torch.Tensor) -> None:
        query, key, value = (part.unflatten(-1, (-1, attention.head_size)) for part in qkv)
        if blind:
            rows = [torch.from_numpy(prompt.places.vision_places() + prompt.first_row) for prompt in blind]
            index = torch.cat(rows).to(query.device)
            output[index] = attend_without(attention, query, key, value, index).flatten(1)[index]
        for edit, prompt in edits:
            here = slice(prompt.first_row, prompt.end_row)
            images = [(image.offset, image.length) for image in prompt.places.images]
            heads = Heads(query[here], key[here], value[here], attention.impl.scale)
            for index, edited in edited_rows(edit, heads, images):
                output[index + prompt.first_row] = edited.flatten(1)

    return change


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
