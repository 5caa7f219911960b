"""What a worker knows of its requests between steps, and the rows of a step made of it; no runner's type is used."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

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
        plan: by which its prompt runs.
        cached: the plan by which its caches are counted once the prompt has run.
        survivors: what an adaptive method has chosen; a preempted prompt keeps the same tokens.
    """

    plan: Plan
    cached: Plan
    survivors: Survivors | None = None

    def at(self, num_computed_tokens: int) -> Plan:
        """The plan by which a step is counted that starts after so many tokens."""
        return self.cached if num_computed_tokens >= self.plan.num_prompt_tokens else self.plan


class WorkerRequests:
    """The records of all requests, and what is kept of their images from step to step."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.records: dict[str, WorkerRecord] = {}
        self.reduced: dict[str, Reduced] = {}
        """By a feature's identifier, which patches the vision tower left; as long as the feature is cached."""
        self.states: dict[int, torch.Tensor] = {}
        """By the scheduler's number, hidden states [n, C] that entered a first cut; dropped when it says so."""
        self.orders = Orders()
        self.carried: dict[str, torch.Tensor] = {}
        """By request id, the states that enter a first cut in this step."""

    def begin_step(self, scheduler_output: Any) -> None:
        """Forget finished requests and freed features, plan new requests, take the scheduler's orders.

        Also in steps that run nothing. A preempted request keeps its record, though V2 runners meet it as new again.
        """
        for request_id in scheduler_output.finished_req_ids:
            self.records.pop(request_id, None)
        for identifier in scheduler_output.free_encoder_mm_hashes:
            self.reduced.pop(identifier, None)
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id not in self.records:
                plan, _ = self.planner.plan_or_refuse(new.prompt_len, new.mm_features, new.sampling_params)
                self.records[new.req_id] = WorkerRecord(plan, plan.after_prefill(self.planner.schedule))
        self.orders = getattr(scheduler_output, "prefix_orders", Orders())
        reuse = self.orders.reuse.items()
        self.carried = {request_id: self.states[each.state][: each.num_rows] for request_id, each in reuse}
        for state in self.orders.drop:
            self.states.pop(state, None)

    def by_encoding(self, scheduled_encoder_inputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """By the way of encoding (``Plan.encoding``), which of vLLM's scheduled encoder inputs are encoded in it."""
        by_encoding: dict[str, dict[str, Any]] = {}
        for request_id, images in scheduled_encoder_inputs.items():
            by_encoding.setdefault(self.records[request_id].plan.encoding, {})[request_id] = images
        return by_encoding

    def keep_reduced(self, identifiers: Iterable[str], reduced: Sequence[Reduced | None]) -> None:
        """Keep what the tower left of the features of these identifiers, in the order in which they were encoded."""
        if reduced:
            pairs = zip(identifiers, reduced, strict=True)
            self.reduced.update({identifier: each for identifier, each in pairs if each is not None})

    def lay_out(
        self,
        request_ids: Sequence[str],
        num_computed_tokens: npt.NDArray[np.int32],
        num_scheduled_tokens: npt.NDArray[np.int32],
        methods: Mapping[str, Method],
    ) -> StagedStep:
        """The step that :func:`make_step` lays out for R requests, without the reading of cached keys."""
        records = [self.records[request_id] for request_id in request_ids]
        plans = [record.at(computed) for record, computed in zip(records, num_computed_tokens, strict=True)]
        step = make_step(request_ids, plans, num_computed_tokens, num_scheduled_tokens, methods)
        return replace(step, prefills=tuple(map(self._with_record, step.prefills))) if step.prefills else step

    def _with_record(self, prefill: PrunedPrefill) -> PrunedPrefill:
        request_id = prefill.request_id
        return replace(
            prefill,
            recorded=self.records[request_id].survivors,
            carried=self.carried.get(request_id),
            keeps_state=request_id in self.orders.keep,
        )

    def with_reduced(self, prefill: PrunedPrefill, features: Sequence[Any]) -> PrunedPrefill:
        """The prompt with what the vision tower left of its images, given vLLM's ``features`` of its request."""
        ordered = sorted(features, key=lambda feature: feature.mm_position.offset)
        reduced = [self.reduced[each.identifier] for each in ordered if each.identifier in self.reduced]
        if not reduced or len(reduced) < len(ordered):
            return prefill  # a client sent features: nothing was merged, and no patch is a key token
        return replace(prefill, reduced=tuple(reduced))

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
        """Keep the step's states and decisions; return (place in the batch, record) of every adaptive prompt."""
        self.states.update({self.orders.keep[request_id]: state for request_id, state in outcome.states.items()})
        decided = []
        for prefill in outcome.step.prefills:
            if prefill.plan.adaptive:
                record = self.records[prefill.request_id]
                record.survivors = outcome.survivors[prefill.request_id]
                record.plan = replace(prefill.plan, decided=True)
                record.cached = record.plan.after_prefill(self.planner.schedule)
                decided.append((prefill.index, record))
        return decided


def attach_report(output: ModelRunnerOutput, outcome: Outcome) -> ModelRunnerOutput:
    """Attach what ran to vLLM's output of the step, which goes to the scheduler."""
    step = outcome.step
    reported: Any = output
    reported.rows_run = step.rows_run()
    reported.selection_seconds, reported.patches = outcome.selecting.seconds(), outcome.patches
    reported.decided = {p.request_id: p.plan.kept for p in step.prefills if p.plan.adaptive}
    return output


class ReportingOutput(AsyncModelRunnerOutput):
    """An asynchronous output of vLLM's, to which the report is attached once the device is done with the step."""

    def __init__(self, output: AsyncModelRunnerOutput, outcome: Outcome) -> None:
        self.output = output
        self.outcome = outcome

    def get_output(self) -> ModelRunnerOutput:
        """Wait for vLLM's output, and attach the report."""
        return attach_report(self.output.get_output(), self.outcome)


def with_report(output: Any, outcome: Outcome | None) -> Any:
    """What a runner returns for a step, with the report of a staged loop that ran in it."""
    if outcome is None:
        return output
    is_async = isinstance(output, AsyncModelRunnerOutput)
    return ReportingOutput(output, outcome) if is_async else attach_report(output, outcome)
