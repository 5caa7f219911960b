"""Where the rows of every prompt and image stand in a stage, and the index that gathers the next stage's rows."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_hidrop.plan.places import Span, StagePlaces
from vllm_hidrop.plan.signal import Under
from vllm_hidrop.staged.signals import PromptAttention
from vllm_hidrop.staged.step import PrunedPrefill, StagedStep

Key = tuple[int, int]
"""A request's place in the batch, and the index of one of its images."""


@dataclass(frozen=True)
class PromptRows:
    """The rows of one prompt among a stage's rows.

    Attributes:
        places: where the stage holds the prompt's tokens.
        num_cached: tokens of the prompt that the stage has cached already; they have no rows.
    """

    prefill: PrunedPrefill
    places: StagePlaces
    first_row: int
    num_cached: int

    @property
    def end_row(self) -> int:
        """Row after the prompt's last one; tokens generated before a preemption follow there."""
        return self.first_row + self.places.count(self.prefill.plan.num_prompt_tokens) - self.num_cached

    def row(self, place: int) -> int:
        """Row of the token at a stage place; less than ``first_row`` where the token is cached."""
        return self.first_row + place - self.num_cached

    def attention(self, attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> PromptAttention:
        """The prompt in one layer's attention module, given Q [T, H * D], K and V [T, G * D] of the stage's rows."""
        own = slice(self.first_row, self.end_row)
        read_keys = self.prefill.read_keys
        cached = None if read_keys is None else read_keys(attention, self.num_cached)
        shape = attention.num_heads, attention.num_kv_heads, attention.impl.scale
        num_tokens = self.prefill.plan.num_prompt_tokens
        return PromptAttention(query, key, value, own, cached, self.places, num_tokens, shape)


ScoredPrompt = tuple[PromptRows, list[int]]
"""A prompt's rows, and the indices of the images that its method scores or decides about."""


@dataclass(frozen=True)
class ImageRun:
    """One image's run of rows on entry to a stage.

    Attributes:
        prompt: the rows of the image's prompt, as the stage before left them.
        image: index of the image in the prompt.
        keep: rows of the image in the stage that is entered.
    """

    prompt: PromptRows
    image: int
    keep: int

    @property
    def key(self) -> Key:
        """Names the run among a step's."""
        return self.prompt.prefill.index, self.image

    @property
    def places(self) -> Span:
        """Stage places of the image's tokens in the stage before."""
        return self.prompt.places.images[self.image]

    @property
    def num_rows(self) -> int:
        """Rows of the image in the stage before."""
        return self.places.length

    @property
    def first_row(self) -> int:
        """The image's first row in the stage before."""
        return self.prompt.row(self.places.offset)

    @property
    def injects(self) -> bool:
        """Whether the image's rows come from the projector."""
        return self.keep > self.num_rows

    @property
    def selects(self) -> bool:
        """Whether some of the image's rows stay and some go."""
        return 0 < self.keep < self.num_rows


def image_runs(step: StagedStep, stage: int) -> list[ImageRun]:
    """Every image whose number of rows changes on entry to ``stage``, in row order."""
    starts = step.entering(stage).row_starts
    changing = []
    for prefill in step.prefills:
        plan = prefill.plan
        carries_in = prefill.carried is not None and plan.first_cut == stage
        num_before = prefill.num_cached(stage - 1) if stage else prefill.num_computed
        num_cached = plan.carried_from if carries_in else num_before
        prompt = PromptRows(prefill, plan.places_entering(stage), int(starts[prefill.index]), num_cached)
        has_carried = stage >= plan.first_cut
        runs = (ImageRun(prompt, image, keep) for image, keep in enumerate(plan.kept[stage]))
        changing += [r for r in runs if r.keep != r.num_rows and (has_carried or not prefill.is_carried(r.image))]
    return changing


def prompt_rows(step: StagedStep, stage: int) -> Iterator[PromptRows]:
    """The rows of every pruned prompt in ``stage``."""
    starts = step.stages[stage].row_starts
    for prefill in step.prefills:
        places = prefill.plan.places[stage]
        yield PromptRows(prefill, places, int(starts[prefill.index]), prefill.num_cached(stage))


def scored_behind(step: StagedStep, stage: int) -> list[ScoredPrompt]:
    """The prompts and images that are scored under the last layer of ``stage``, for the next stage."""
    runs = (
        ImageRun(prompt, image, keep)
        for prompt in prompt_rows(step, stage)
        for image, keep in enumerate(prompt.prefill.plan.kept[stage + 1])
    )
    return scored_under(Under.LAST_LAYER, runs)


def scored_under(layer: Under, runs: Iterable[ImageRun]) -> list[ScoredPrompt]:
    """Among some runs, the prompts and images whose signal is computed under this layer."""
    by_index: dict[int, ScoredPrompt] = {}
    for run in runs:
        if run.selects and run.prompt.prefill.method.signal.under is layer:
            by_index.setdefault(run.prompt.prefill.index, (run.prompt, []))[1].append(run.image)
    return list(by_index.values())


def full_row(step: StagedStep, prefill: PrunedPrefill, image: int) -> int:
    """Index of an image's first row among the step's full rows and, after them, the carried ones; -1: in neither."""
    plan = prefill.plan
    offset = plan.spans[image].offset
    if not prefill.is_carried(image):
        return int(step.full.row_starts[prefill.index]) + offset - prefill.num_computed
    return step.first_carried[prefill.index] + plan.num_carried(offset) if prefill.carried is not None else -1


def after_injection(runs: list[ImageRun]) -> list[ImageRun]:
    """The runs that do not inject, moved to where their rows stand once the other runs have been injected.

    Within one prompt either all changing images inject or none does, so a run moves by what earlier prompts inject.
    """
    others = []
    num_injected = 0
    for run in runs:
        if run.injects:
            num_injected += run.keep
        else:
            others.append(replace(run, prompt=replace(run.prompt, first_row=run.prompt.first_row + num_injected)))
    return others


def image_places(step: StagedStep, num_rows: int) -> npt.NDArray[np.int64]:
    """Of every full row and, after them, carried row, the token's place inside its image, int64 [num_rows]; text: 0."""
    places = np.zeros(num_rows, dtype=np.int64)
    for prefill in step.prefills:
        for image, span in enumerate(prefill.plan.spans):
            first = full_row(step, prefill, image)
            if first >= 0:
                places[first : first + span.length] = np.arange(span.length)
    return places


def gather_index(
    step: StagedStep,
    runs: list[ImageRun],
    num_rows: int,
    decided: Mapping[Key, npt.NDArray[np.int64]],
    selected: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Where the next stage's rows stand among the ``num_rows`` current rows and, after them, the full rows, int64 [T'].

    Runs that inject take their rows from the full rows; of the others stay: those that were ``decided`` on the host,
    int64 [keep], zero-based inside the run; the ``selected`` rows of all other runs that select, in their order, int64;
    or nothing. All sizes are known on the host: nothing is read back from the device.
    """
    pieces: list[npt.NDArray[np.int64]] = []
    places: list[npt.NDArray[np.int64]] = []  # of the selected rows in the index
    cursor = length = 0
    for run in runs:
        first_row = run.first_row
        pieces.append(np.arange(cursor, first_row))
        length += first_row - cursor
        if run.injects:
            pieces.append(full_row(step, run.prompt.prefill, run.image) + np.arange(run.keep) + num_rows)
        elif run.key in decided:
            pieces.append(decided[run.key] + first_row)
        elif run.keep:
            pieces.append(np.zeros(run.keep, dtype=np.int64))
            places.append(np.arange(length, length + run.keep))
        length += run.keep
        cursor = first_row + run.num_rows
    pieces.append(np.arange(cursor, num_rows))
    host = np.concatenate([*pieces, *places])
    index, at = async_tensor_h2d(host, device=device).tensor_split([length + num_rows - cursor])
    return index if selected is None else index.index_copy_(0, at, selected)
