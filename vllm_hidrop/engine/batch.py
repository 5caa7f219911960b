"""One step's rows, stage by stage, as host data computed without looking at any token.

Knows plans and counts; not vLLM, not tensors on a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vllm_hidrop.positions import grouped_ids
from vllm_hidrop.pruning import Plan

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class StageBatch:
    """The compact rows of one stage in one step.

    ::

        step rows    | r0: t t v v v v t | r1: o | r2: t t t |     positions of the full prompts
        stage rows   | r0: t t v t       | r1: o | r2: t t t |     the same positions, fewer rows
        slots        |     0 1 2 3       |     9 |     0 1 2 |     compact places in the stage's cache

    Attributes:
        num_rows: int32 [R], rows of each request in this step.
        seq_lens: int32 [R], tokens of each request in this stage's cache after the step.
    """

    num_rows: IntArray
    seq_lens: IntArray

    @cached_property
    def row_starts(self) -> IntArray:
        """int32 [R + 1], first row of each request, and the total."""
        starts = np.zeros(len(self.num_rows) + 1, dtype=np.int32)
        np.cumsum(self.num_rows, out=starts[1:])
        return starts

    @cached_property
    def num_tokens(self) -> int:
        """Rows of the stage in this step."""
        return int(self.row_starts[-1])

    @cached_property
    def requests_and_slots(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """int64 [T] each: the request of every row, and its compact slot in that request's cache."""
        requests = np.repeat(np.arange(len(self.num_rows)), self.num_rows)
        first_slots = self.seq_lens - self.num_rows - self.row_starts[:-1]
        return requests, np.arange(self.num_tokens) + first_slots[requests]


@dataclass(frozen=True)
class PrunedPrefill:
    """A request whose pruned prompt is prefilled in this step."""

    request_id: str
    index: int
    """Place in the batch."""
    plan: Plan


@dataclass(frozen=True)
class StagedStep:
    """All stages of one step. Stages that hold the same rows share one :class:`StageBatch` object."""

    full: StageBatch
    stages: tuple[StageBatch, ...]
    prefills: tuple[PrunedPrefill, ...]

    @property
    def is_uniform(self) -> bool:
        """Whether every row runs through every layer, so that vLLM's own forward can run the step."""
        return not self.prefills

    def rows_run(self) -> dict[str, tuple[int, ...]]:
        """Rows of every stage, by request id, for the prompts pruned in this step."""
        return {
            p.request_id: tuple(p.plan.num_prompt_tokens - dropped for dropped in p.plan.dropped) for p in self.prefills
        }


def make_step(
    request_ids: Sequence[str],
    plans: Sequence[Plan],
    num_computed_tokens: IntArray,
    num_scheduled_tokens: IntArray,
) -> StagedStep:
    """Lay out one step.

    Args:
        request_ids: [R], in batch order.
        plans: [R].
        num_computed_tokens: int32 [R], tokens of the full sequence already in the cache.
        num_scheduled_tokens: int32 [R], tokens of the full sequence this step adds.
    """
    dropped = np.array([plan.dropped for plan in plans], dtype=np.int32).T
    starts_here = num_computed_tokens == 0
    totals = num_computed_tokens + num_scheduled_tokens
    full = StageBatch(num_scheduled_tokens, totals)
    shared: dict[bytes, StageBatch] = {np.zeros(len(plans), np.int32).tobytes(): full}
    stages = []
    for column in dropped:
        key = column.tobytes()
        if key not in shared:
            shared[key] = StageBatch(num_scheduled_tokens - column * starts_here, totals - column)
        stages.append(shared[key])
    prefills = tuple(
        PrunedPrefill(request_ids[i], int(i), plans[i]) for i in np.flatnonzero(starts_here) if plans[i].is_pruned
    )
    return StagedStep(full, tuple(stages), prefills)


def grouped_positions(full: StageBatch, plans: Sequence[Plan]) -> npt.NDArray[np.int64]:
    """Grouped ids of a step's full rows, int64 [T]; ``plans`` [R] in batch order."""
    _, places = full.requests_and_slots
    parts = np.split(places, full.row_starts[1:-1])
    return np.concatenate([grouped_ids(part, plan.spans) for part, plan in zip(parts, plans, strict=True)])
