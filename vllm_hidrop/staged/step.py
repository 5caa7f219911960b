"""Which rows every stage runs in one step, as host data: counts and places, no token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_hidrop.methods.base import Method
from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.positions import grouped_ids
from vllm_hidrop.staged.merging import Reduced

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class StageBatch:
    """The compact rows of one stage in one step.

    ::

        step rows    | r0: t t v v v v t | r1: o | r2: t t t |     positions of the full prompts
        stage rows   | r0: t t v t       | r1: o | r2: t t t |     the same positions, fewer rows
        slots        |     0 1 2 3       |     9 |     0 1 2 |     compact places in the stage's cache

    Attributes:
        num_rows: int32 [R], rows of each request in this step.
        seq_lens: int32 [R], tokens of each request in the stage's cache after the step.
    """

    num_rows: IntArray
    seq_lens: IntArray

    @cached_property
    def row_starts(self) -> IntArray:
        """int32 [R + 1], first row of each request, then the number of all rows."""
        starts = np.zeros(len(self.num_rows) + 1, dtype=np.int32)
        np.cumsum(self.num_rows, out=starts[1:])
        return starts

    @cached_property
    def num_tokens(self) -> int:
        """Rows of the stage in this step."""
        return int(self.row_starts[-1])

    @cached_property
    def requests_and_slots(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """int64 [T] each: every row's request, by its place in the batch, and slot in that request's cache."""
        requests = np.repeat(np.arange(len(self.num_rows)), self.num_rows)
        first_slots = self.seq_lens - self.num_rows - self.row_starts[:-1]
        return requests, np.arange(self.num_tokens) + first_slots[requests]

    @cached_property
    def state_key(self) -> tuple[bytes, bytes]:
        """Equal for batches whose recurrent layers run alike: the rows, and whose state has taken in any before."""
        return self.num_rows.tobytes(), (self.seq_lens > self.num_rows).tobytes()

    def without(self, fewer: IntArray) -> "StageBatch":
        """The batch with ``fewer`` rows less of each request, int32 [R]."""
        return StageBatch(self.num_rows - fewer, self.seq_lens - fewer)


ReadKeys = Callable[[Any, int], Any]
"""(attention module, n) -> K of a prompt's first n slots in that layer's cache, [n, G * D]."""
Survivors = tuple[tuple[IntArray, ...], ...]
"""Per stage and image, the vision tokens that the stage runs: int32, in row order, zero-based inside the image."""


@dataclass(frozen=True)
class PrunedPrefill:
    """A pruned prompt that is prefilled in this step.

    Attributes:
        index: its request's place in the batch.
        method: scores or decides at its cuts.
        recorded: survivors that an adaptive method chose before the request was preempted; they are chosen again.
        reduced: per image, which patches the vision tower left; empty where the tower reduces nothing.
        num_computed: prompt tokens that the caches hold already; the step runs the tokens after them.
        read_keys: reads the cached tokens' K; None where nothing is cached.
        carried: hidden states [n, C] that enter the first cut beside the step's rows; None unless images are reused.
        keeps_state: whether the worker keeps the hidden states that enter the first cut, to the end of the last image.
    """

    request_id: str
    index: int
    plan: Plan
    method: Method
    recorded: Survivors | None = None
    reduced: tuple[Reduced, ...] = ()
    num_computed: int = 0
    read_keys: ReadKeys | None = None
    carried: Any = None
    keeps_state: bool = False

    def num_cached(self, stage: int) -> int:
        """Slots of a stage's cache that were written before this step."""
        return self.plan.stage_tokens(stage, self.num_computed)

    def is_carried(self, image: int) -> bool:
        """Whether an image is not among the step's rows; its rows come with the carried states, if any."""
        return self.plan.spans[image].offset < self.num_computed


@dataclass(frozen=True)
class StagedStep:
    """All stages of one step. Stages that hold the same rows share one :class:`StageBatch` object."""

    full: StageBatch
    stages: tuple[StageBatch, ...]
    prefills: tuple[PrunedPrefill, ...]

    def entering(self, stage: int) -> StageBatch:
        """The rows on entry to a stage: those of the stage before, and the carried rows of prompts first cut here."""
        before = self.stages[stage - 1] if stage else self.full
        num_rows = before.num_rows.copy()
        for prefill in self.carrying(stage):
            num_rows[prefill.index] += len(prefill.carried)
        return StageBatch(num_rows, before.seq_lens)

    def carrying(self, stage: int) -> list[PrunedPrefill]:
        """Prompts whose carried states enter at this stage, their first cut."""
        return [p for p in self.prefills if p.carried is not None and p.plan.first_cut == stage]

    @cached_property
    def first_carried(self) -> dict[int, int]:
        """By place in the batch, the index of a prompt's first carried row: carried rows follow the full rows."""
        first_carried = {}
        end = self.full.num_tokens
        for prefill in self.prefills:
            if prefill.carried is not None:
                first_carried[prefill.index] = end
                end += len(prefill.carried)
        return first_carried

    def renumbered_ids(self, stage: int) -> npt.NDArray[np.int64]:
        """RoPE ids of a stage's rows, int64 [T], under renumbered positions.

        ::

            slots             0 1 2 3 4 5 | 6         six rows of a prompt of eight, and the first generated token
            ids               2 3 4 5 6 7 | 8         slots plus the two dropped tokens: the same differences, and the
                                                      generated token has the full sequence's id in every stage
        """
        batch = self.stages[stage]
        requests, slots = batch.requests_and_slots
        return slots + (self.full.seq_lens - batch.seq_lens)[requests]

    @property
    def is_uniform(self) -> bool:
        """Whether every layer runs every row, so that vLLM's own forward can run the step."""
        return not self.prefills

    def rows_run(self) -> dict[str, tuple[int, ...]]:
        """By request id, the rows of the whole prompt in every stage, for the pruned prompts."""
        return {
            p.request_id: tuple(p.plan.num_prompt_tokens - dropped for dropped in p.plan.dropped) for p in self.prefills
        }

    def bounded(self, stage: int, kept: Mapping[int, Sequence[int]]) -> "StagedStep":
        """The step with at most ``kept[index][image]`` tokens of prompts, by place in the batch, from ``stage`` on."""
        plans = [p.plan.bounded(stage, kept[p.index]) if p.index in kept else p.plan for p in self.prefills]
        changed = [(p, plan) for p, plan in zip(self.prefills, plans, strict=True) if plan != p.plan]
        if not changed:
            return self
        shared: dict[tuple[int, bytes], StageBatch] = {}
        stages = list(self.stages[:stage])
        for index in range(stage, len(self.stages)):
            fewer = np.zeros_like(self.full.num_rows)
            for prefill, plan in changed:
                fewer[prefill.index] = plan.dropped[index] - prefill.plan.dropped[index]
            before = self.stages[index]
            key = id(before), fewer.tobytes()
            if key not in shared:
                shared[key] = before.without(fewer) if fewer.any() else before
            stages.append(shared[key])
        prefills = tuple(replace(p, plan=plan) for p, plan in zip(self.prefills, plans, strict=True))
        return replace(self, stages=tuple(stages), prefills=prefills)


def make_step(
    request_ids: Sequence[str],
    plans: Sequence[Plan],
    num_computed_tokens: IntArray,
    num_scheduled_tokens: IntArray,
    methods: Mapping[str, Method],
) -> StagedStep:
    """Lay out one step of R requests, in batch order; ``methods`` are by name.

    ``num_computed_tokens`` of every full sequence, int32 [R], were computed before, ``num_scheduled_tokens`` are now.
    """
    prompt_lengths = np.array([plan.num_prompt_tokens for plan in plans], dtype=np.int32)
    totals = num_computed_tokens + num_scheduled_tokens
    has_run, runs = num_computed_tokens >= prompt_lengths, totals >= prompt_lengths
    prefilled = [int(i) for i in np.flatnonzero(runs & ~has_run) if plans[i].is_pruned]
    dropped = np.array([plan.dropped for plan in plans], dtype=np.int32).T
    dropped_before, dropped_after = dropped * has_run, dropped * runs  # each [stages, R]
    for i in prefilled:
        if num_computed_tokens[i] > plans[i].prefix_tokens:  # the prompt starts behind a reused image
            held = [plans[i].stage_tokens(stage, int(num_computed_tokens[i])) for stage in range(len(dropped))]
            dropped_before[:, i] = num_computed_tokens[i] - np.array(held)
    full = StageBatch(num_scheduled_tokens, totals)
    shared: dict[bytes, StageBatch] = {np.zeros(2 * len(plans), np.int32).tobytes(): full}
    stages = []
    for before, after in zip(dropped_before, dropped_after, strict=True):
        key = before.tobytes() + after.tobytes()
        if key not in shared:
            shared[key] = StageBatch(num_scheduled_tokens + before - after, totals - after)
        stages.append(shared[key])
    prefills = tuple(
        PrunedPrefill(request_ids[i], i, plans[i], methods[plans[i].method], num_computed=int(num_computed_tokens[i]))
        for i in prefilled
    )
    return StagedStep(full, tuple(stages), prefills)


def grouped_positions(full: StageBatch, plans: Sequence[Plan]) -> npt.NDArray[np.int64]:
    """Grouped ids of a step's full rows, int64 [T]; ``plans`` [R] in batch order."""
    _, places = full.requests_and_slots
    parts = np.split(places, full.row_starts[1:-1])
    return np.concatenate([grouped_ids(part, plan.spans) for part, plan in zip(parts, plans, strict=True)])
