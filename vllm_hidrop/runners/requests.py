"""What a worker knows of its requests between steps, and a step's layout made of it; the same under every runner."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_hidrop.engine.image_prefix import Orders
from vllm_hidrop.methods.base import Method
from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.planner import Planner
from vllm_hidrop.plan.positions import PositionScheme, grouped_ids
from vllm_hidrop.staged.loop import Outcome
from vllm_hidrop.staged.merging import Reduced
from vllm_hidrop.staged.step import PrunedPrefill, StagedStep, Survivors, make_step


@dataclass
class WorkerRecord:
    """One request.

    Attributes:
        plan: its prompt's prefill runs by it.
        cached: what its caches hold afterwards.
        survivors: what was decided, once it was; a preempted prompt runs by it again.
    """

    plan: Plan
    cached: Plan
    survivors: Survivors | None = None

    def at(self, num_computed_tokens: int) -> Plan:
        """What counts the stages' tokens in a step that starts there."""
        return self.cached if num_computed_tokens >= self.plan.num_prompt_tokens else self.plan


class WorkerRequests:
    """The records of all requests, and what outlives a step of their images.

    Args:
        planner: of the server.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.records: dict[str, WorkerRecord] = {}
        self.reduced: dict[str, Reduced] = {}
        """By a feature's identifier, what the vision tower left of the image; as long as the feature is cached."""
        self.states: dict[int, torch.Tensor] = {}
        """Hidden states that enter the first cut, by the scheduler's number; dropped by its order."""
        self.orders = Orders()
        self.carried: dict[str, torch.Tensor] = {}
        """By request id, the states that enter the first cut in this step."""

    def begin_step(self, scheduler_output: Any) -> None:
        """Forget what is finished and freed, take the scheduler's orders; also in steps that run nothing."""
        for request_id in scheduler_output.finished_req_ids:
            self.records.pop(request_id, None)
        for identifier in scheduler_output.free_encoder_mm_hashes:
            self.reduced.pop(identifier, None)
        self.orders = getattr(scheduler_output, "prefix_orders", Orders())
        self.carried = {name: self.states[each.state][: each.num_rows] for name, each in self.orders.reuse.items()}
        for state in self.orders.drop:
            self.states.pop(state, None)

    def record(self, request: Any) -> WorkerRecord:
        """The record of vLLM's request, planned when it is first seen."""
        record = self.records.get(request.req_id)
        if record is None:
            plan, _ = self.planner.plan_or_refuse(request)
            record = WorkerRecord(plan, plan.after_prefill(self.planner.schedule))
            self.records[request.req_id] = record
        return record

    def lay_out(
        self,
        requests: Sequence[Any],
        num_computed_tokens: npt.NDArray[np.int32],
        num_scheduled_tokens: npt.NDArray[np.int32],
        methods: Mapping[str, Method],
    ) -> StagedStep:
        """This step's layout, without the reading of cached keys.

        Args:
            requests: [R], vLLM's, in batch order.
            num_computed_tokens: int32 [R].
            num_scheduled_tokens: int32 [R].
            methods: by method, what picks tokens.
        """
        records = [self.record(request) for request in requests]
        plans = [record.at(computed) for record, computed in zip(records, num_computed_tokens, strict=True)]
        names = [request.req_id for request in requests]
        step = make_step(names, plans, num_computed_tokens, num_scheduled_tokens, methods)
        return replace(step, prefills=tuple(map(self._with_record, step.prefills)))

    def _with_record(self, prefill: PrunedPrefill) -> PrunedPrefill:
        name = prefill.request_id
        return replace(
            prefill,
            recorded=self.records[name].survivors,
            carried=self.carried.get(name),
            keeps_state=name in self.orders.keep,
        )

    def with_reduced(self, prefill: PrunedPrefill, features: Sequence[Any]) -> PrunedPrefill:
        """The prompt with what the vision tower left of its images; ``features`` are vLLM's, of its request."""
        ordered = sorted(features, key=lambda feature: feature.mm_position.offset)
        found = [self.reduced[each.identifier] for each in ordered if each.identifier in self.reduced]
        if not found or len(found) < len(ordered):
            return prefill  # features came with the request: nothing was merged, and no patch is a key
        return replace(prefill, reduced=tuple(found))

    def carried_ids(self, prefill: PrunedPrefill) -> npt.NDArray[np.int64]:
        """RoPE ids of the rows that a prompt carries into its first cut, int64 [n]."""
        plan = prefill.plan
        ids = plan.places_carried(prefill.num_computed)
        if self.planner.positions is PositionScheme.GROUPED:
            return grouped_ids(ids, plan.spans)
        if plan.renumbered:
            return np.arange(len(ids)) + plan.carried_from + plan.dropped[plan.first_cut - 1]
        return ids

    def ran(self, outcome: Outcome) -> list[tuple[int, WorkerRecord]]:
        """Remember what a step came to; return (place in the batch, record) of the prompts that were decided about."""
        self.states.update({self.orders.keep[name]: state for name, state in outcome.states.items()})
        decided = []
        for prefill in outcome.step.prefills:
            if prefill.plan.adaptive:
                record = self.records[prefill.request_id]
                record.survivors = outcome.survivors[prefill.request_id]
                record.plan = replace(prefill.plan, decided=True)
                record.cached = record.plan.after_prefill(self.planner.schedule)
                decided.append((prefill.index, record))
        return decided


def attach_report(output: Any, outcome: Outcome) -> None:
    """Tell the scheduler, with vLLM's output of the step, what ran."""
    step = outcome.step
    output.rows_run = step.rows_run()
    output.selection_seconds, output.patches = outcome.selection_seconds, outcome.patches
    output.decided = {p.request_id: p.plan.kept for p in step.prefills if p.plan.adaptive}
