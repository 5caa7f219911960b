"""Where every prompt's and image's rows stand in a stage, and the gather from one stage's rows to the next stage's."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_hidrop.plan.places import Span, StagePlaces
from vllm_hidrop.plan.signal import Under
from vllm_hidrop.staged.signals import PromptAttention
from vllm_hidrop.staged.step import PrunedPrefill, StagedStep

Key = tuple[int, int]
"""A request's place in the batch, and one of its images."""
Selections = Mapping[Key, torch.Tensor | npt.NDArray[np.int64]]
"""Per image, the rows chosen inside its current run, int64 [keep]."""


@dataclass(frozen=True)
class PromptRows:
    """The rows of one prompt among the current rows of a step.

    Attributes:
        prefill: the prompt.
        places: of its tokens in the stage whose rows these are.
        first_row: of the prompt, in the current rows.
        num_cached: tokens of the stage before the first row: they are in the KV cache.
    """

    prefill: PrunedPrefill
    places: StagePlaces
    first_row: int
    num_cached: int

    @property
    def end_row(self) -> int:
        """Exclusive; rows of tokens generated before a preemption follow."""
        return self.first_row + self.places.count(self.prefill.plan.num_prompt_tokens) - self.num_cached

    def row(self, place: int) -> int:
        """Row of the token at a stage place; below ``first_row`` where it is cached."""
        return self.first_row + place - self.num_cached

    def attention(self, attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> PromptAttention:
        """The prompt in one layer's attention module, given Q [T, H * D], K and V [T, G * D] of the current rows."""
        here = slice(self.first_row, self.end_row)
        keys = key[here]
        if self.prefill.read_keys is not None:
            keys = torch.cat((self.prefill.read_keys(attention, self.num_cached), keys))
        shape = attention.num_heads, attention.num_kv_heads, attention.impl.scale
        num_tokens = self.prefill.plan.num_prompt_tokens
        return PromptAttention(query[here], keys, value[here], self.places, num_tokens, shape)


ScoredPrompt = tuple[PromptRows, list[int]]
"""A prompt's rows, and the images among them that its method scores or judges."""


@dataclass(frozen=True)
class ImageRun:
    """One image's run of rows before and after a change of stage.

    Attributes:
        prompt: its prompt's rows before the change.
        image: which of the prompt's images.
        keep: rows after the change.
    """

    prompt: PromptRows
    image: int
    keep: int

    @property
    def key(self) -> Key:
        """Names the run in :data:`Selections`."""
        return self.prompt.prefill.index, self.image

    @property
    def places(self) -> Span:
        """Of its tokens before the change."""
        return self.prompt.places.images[self.image]

    @property
    def num_rows(self) -> int:
        """Rows before the change."""
        return self.places.length

    @property
    def first_row(self) -> int:
        """First row of the run in the current rows."""
        return self.prompt.row(self.places.offset)

    @property
    def injects(self) -> bool:
        """Whether the image comes in from the projector."""
        return self.keep > self.num_rows

    @property
    def selects(self) -> bool:
        """Whether a score decides who stays."""
        return 0 < self.keep < self.num_rows


def image_runs(step: StagedStep, stage: int) -> list[ImageRun]:
    """Every image that changes on entry to ``stage``, in row order, in the rows of the stage before."""
    starts = step.entering(stage).row_starts
    found = []
    for prefill in step.prefills:
        plan = prefill.plan
        comes_in = prefill.carried is not None and plan.first_cut == stage
        num_cached = plan.carried_from if comes_in else prefill.num_cached(stage - 1) if stage else prefill.num_computed
        prompt = PromptRows(prefill, plan.places_entering(stage), int(starts[prefill.index]), num_cached)
        is_in = stage >= plan.first_cut
        runs = (ImageRun(prompt, image, keep) for image, keep in enumerate(plan.kept[stage]))
        found += [run for run in runs if run.keep != run.num_rows and (is_in or not prefill.is_carried(run.image))]
    return found


def prompt_rows(step: StagedStep, stage: int) -> Iterator[PromptRows]:
    """Every prompt's rows in ``stage``."""
    starts = step.stages[stage].row_starts
    for prefill in step.prefills:
        places = prefill.plan.places[stage]
        yield PromptRows(prefill, places, int(starts[prefill.index]), prefill.num_cached(stage))


def scored_behind(step: StagedStep, stage: int) -> list[ScoredPrompt]:
    """The prompts that are scored under the last layer of ``stage``, for the next one."""
    runs = (
        ImageRun(prompt, image, keep)
        for prompt in prompt_rows(step, stage)
        for image, keep in enumerate(prompt.prefill.plan.kept[stage + 1])
    )
    return scored_under(Under.LAST_LAYER, runs)


def scored_under(layer: Under, runs: Iterable[ImageRun]) -> list[ScoredPrompt]:
    """The prompts, and their images, among some runs whose score is computed under this layer."""
    found: dict[int, ScoredPrompt] = {}
    for run in runs:
        if run.selects and run.prompt.prefill.method.signal.under is layer:
            found.setdefault(run.prompt.prefill.index, (run.prompt, []))[1].append(run.image)
    return list(found.values())


def full_row(step: StagedStep, prefill: PrunedPrefill, image: int) -> int:
    """Index of an image's first row among the step's full rows and, after them, the carried ones."""
    plan = prefill.plan
    offset = plan.spans[image].offset
    if not prefill.is_carried(image):
        return int(step.full.row_starts[prefill.index]) + offset - prefill.num_computed
    return step.first_carried[prefill.index] + plan.num_carried(offset) if prefill.carried is not None else -1


def after_injection(runs: list[ImageRun]) -> list[ImageRun]:
    """The runs that do not inject, in the rows as they are once the others have.

    Within one prompt either all changing images inject or none does, so a run moves by what earlier prompts inject.
    """
    left = []
    injected = 0
    for run in runs:
        if run.injects:
            injected += run.keep
        else:
            left.append(replace(run, prompt=replace(run.prompt, first_row=run.prompt.first_row + injected)))
    return left


def gather_index(
    step: StagedStep, runs: list[ImageRun], num_rows: int, selections: Selections, device: torch.device
) -> torch.Tensor:
    """Index of the next rows into the current rows followed by the step's full rows.

    Runs that inject take their rows from the full rows, which start at index ``num_rows``; the others keep their
    selection, or nothing. All sizes are known on the host: nothing is read back from the device.

    Returns:
        int64 [T_next].
    """
    pieces: list[npt.NDArray[np.int64]] = []
    chosen: list[tuple[int, int, torch.Tensor]] = []
    cursor = length = 0
    for run in runs:
        first_row = run.first_row
        pieces.append(np.arange(cursor, first_row))
        length += first_row - cursor
        if run.injects:
            pieces.append(full_row(step, run.prompt.prefill, run.image) + np.arange(run.keep) + num_rows)
        elif run.keep:
            selection = selections[run.key]
            if isinstance(selection, np.ndarray):
                pieces.append(selection + first_row)
            else:
                pieces.append(np.zeros(run.keep, dtype=np.int64))
                chosen.append((length, first_row, selection))
        length += run.keep
        cursor = first_row + run.num_rows
    pieces.append(np.arange(cursor, num_rows))
    index = torch.from_numpy(np.concatenate(pieces)).to(device, non_blocking=True)
    for first, first_row, selection in chosen:
        index[first : first + len(selection)] = selection + first_row
    return index
