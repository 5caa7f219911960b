"""Where every image's rows stand in a stage, and the gather that leads from one stage's rows to the next.

Knows counts and row indices; not layers, not attention.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.staged.step import PrunedPrefill, StageBatch, StagedStep

Selections = Mapping[tuple[int, int], torch.Tensor | npt.NDArray[np.int64]]
"""(request's place in the batch, image) -> int64 [keep], chosen rows inside the image's current run."""


@dataclass(frozen=True)
class ImageRun:
    """One image's run of rows before and after a change of stage, with its prompt's first and last row."""

    prefill: PrunedPrefill
    image: int
    first_row: int
    """First row of the run in the current rows."""
    num_rows: int
    keep: int
    """Rows after the change."""
    full_first_row: int
    """First row of the image in the step's full rows."""
    prompt_first_row: int
    prompt_last_row: int
    num_cached: int
    """Rows of the prompt before its first one here: they are in the caches."""

    @property
    def key(self) -> tuple[int, int]:
        """Names the run in :data:`Selections`."""
        return self.prefill.index, self.image

    @property
    def injects(self) -> bool:
        """Whether the image comes in from the projector."""
        return self.keep > self.num_rows

    @property
    def selects(self) -> bool:
        """Whether a score decides who stays."""
        return 0 < self.keep < self.num_rows

    @property
    def cuts_inside(self) -> bool:
        """Whether the first layer of the new stage scores."""
        return self.selects and self.prefill.chooser.signal is Signal.NEXT_ATTENTION

    @property
    def scores_before(self) -> bool:
        """Whether the last layer of the old stage scores."""
        return self.selects and self.prefill.chooser.signal is Signal.PREVIOUS_ATTENTION

    def shifted(self, num_rows: int) -> "ImageRun":
        """The same run, ``num_rows`` rows further on."""
        return replace(
            self,
            first_row=self.first_row + num_rows,
            prompt_first_row=self.prompt_first_row + num_rows,
            prompt_last_row=self.prompt_last_row + num_rows,
        )


def image_runs(step: StagedStep, stage: int) -> list[ImageRun]:
    """Every image that changes on entry to ``stage``, in row order, in the rows of the stage before."""
    before = step.entering(stage)
    found = []
    for prefill in step.prefills:
        comes_in = prefill.carried is not None and prefill.plan.first_cut == stage
        num_cached = prefill.plan.carried_from if comes_in else _num_cached_before(prefill, stage)
        runs = _runs_of(step, prefill, before, stage, num_cached)
        is_in = stage >= prefill.plan.first_cut
        found += [run for run in runs if run.keep != run.num_rows and (is_in or not prefill.is_carried(run.image))]
    return found


def scored_before(step: StagedStep, stage: int) -> list[ImageRun]:
    """The images that are scored under the last layer before ``stage``; in that layer's rows if they are among them."""
    before = step.stages[stage - 1]
    return [
        run
        for prefill in step.prefills
        for run in _runs_of(step, prefill, before, stage, _num_cached_before(prefill, stage))
        if run.scores_before
    ]


def _num_cached_before(prefill: PrunedPrefill, stage: int) -> int:
    return prefill.num_cached(stage - 1) if stage else prefill.num_computed


def _runs_of(
    step: StagedStep, prefill: PrunedPrefill, before: StageBatch, stage: int, num_cached: int
) -> Iterator[ImageRun]:
    """All images of a prompt whose first row is slot ``num_cached`` of the stage before."""
    plan = prefill.plan
    first_row = int(before.row_starts[prefill.index])
    dropped = plan.dropped[stage - 1] if stage else 0
    missing = 0
    for image, span in enumerate(plan.spans):
        num_rows = plan.kept[stage - 1][image] if stage else span.length
        yield ImageRun(
            prefill,
            image,
            first_row=first_row + span.offset - missing - num_cached,
            num_rows=num_rows,
            keep=plan.kept[stage][image],
            full_first_row=full_row(step, prefill, image),
            prompt_first_row=first_row,
            prompt_last_row=first_row + plan.num_prompt_tokens - dropped - num_cached - 1,
            num_cached=num_cached,
        )
        missing += span.length - num_rows


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
            left.append(run.shifted(injected))
    return left


def gather_index(runs: list[ImageRun], num_rows: int, selections: Selections, device: torch.device) -> torch.Tensor:
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
        pieces.append(np.arange(cursor, run.first_row))
        length += run.first_row - cursor
        if run.injects:
            pieces.append(np.arange(run.full_first_row, run.full_first_row + run.keep) + num_rows)
        elif run.keep:
            selection = selections[run.key]
            if isinstance(selection, np.ndarray):
                pieces.append(selection + run.first_row)
            else:
                pieces.append(np.zeros(run.keep, dtype=np.int64))
                chosen.append((length, run.first_row, selection))
        length += run.keep
        cursor = run.first_row + run.num_rows
    pieces.append(np.arange(cursor, num_rows))
    index = torch.from_numpy(np.concatenate(pieces)).to(device, non_blocking=True)
    for first, first_row, selection in chosen:
        index[first : first + len(selection)] = selection + first_row
    return index


@dataclass(frozen=True)
class PromptRows:
    """Where one prompt's rows stand in a stage."""

    first: int
    end: int
    images: list[tuple[int, int]]
    """First row, counted from ``first``, and number of rows of every image."""

    def vision_rows(self) -> torch.Tensor:
        """All images' rows in the stage, int64 [N]."""
        return torch.cat([torch.arange(length) + self.first + first for first, length in self.images])

    def text_after_images(self) -> torch.Tensor:
        """Text rows after the first image, counted from ``first``, int64 [N]."""
        is_text = np.ones(self.end - self.first, dtype=np.bool_)
        is_text[: self.images[0][0]] = False
        for first, length in self.images:
            is_text[first : first + length] = False
        return torch.from_numpy(np.flatnonzero(is_text))


def prompt_rows(step: StagedStep, stage: int, prefill: PrunedPrefill) -> PromptRows:
    """A prompt's rows in ``stage``, none cached; those of tokens generated before a preemption follow them."""
    plan = prefill.plan
    assert not prefill.num_computed
    first = int(step.stages[stage].row_starts[prefill.index])
    images = []
    missing = 0
    for span, kept in zip(plan.spans, plan.kept[stage], strict=True):
        images.append((span.offset - missing, kept))
        missing += span.length - kept
    return PromptRows(first, first + plan.num_prompt_tokens - plan.dropped[stage], images)
