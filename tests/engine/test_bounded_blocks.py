"""Plan, report, free: any interleaving of them with preemption, abort and finish, on vLLM's own scheduler and pool.

The worker is played here: it decides counts up to the bounds, keeps its own block tables from what the scheduler tells
it, and its reports come back up to one step late, as under asynchronous scheduling. Both runners' orders: V1 resumes a
preempted request, V2 drops it and meets it as new.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tests.engine.harness import engine
from vllm_hidrop.engine.scheduler import StagedAsyncScheduler, StagedScheduler
from vllm_hidrop.verify.tiny_models import NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

BLOCK = 32
NUM_BLOCKS = 120
LIMITS = {"num_gpu_blocks_override": NUM_BLOCKS, "max_model_len": 256}
SHAPE = {"shape": [NUM_LAYERS, TOKENS_PER_IMAGE]}
CHOICES: dict[str, dict[str, Any]] = {
    "visipruner": {"method": "visipruner", "options": SHAPE | {"shallow_layers": 2, "drop_shallow_kv": True}},
    "mustdrop": {
        "method": "mustdrop",
        "options": SHAPE | {"filter_layers": [1, 3], "merge_window": 2},
    },
    "hidrop": {  # decides nothing; its runs are told late, too
        "method": "hidrop",
        "options": SHAPE | {"inject_layer": 1, "filter_layers": [2, 4], "keeps": [20, 5], "exit_layer": 7},
    },
}


class Worker:
    """What a worker knows: block tables by request and group, and what it once decided."""

    def __init__(self, scheduler: StagedScheduler) -> None:
        self.scheduler = scheduler
        self.tables: dict[str, list[list[int]]] = {}
        self.decided: dict[str, tuple[tuple[int, ...], ...]] = {}

    def run(self, output: SchedulerOutput, shares: list[float]) -> ModelRunnerOutput:
        gone = output.finished_req_ids
        if self.scheduler.use_v2_model_runner:
            gone = gone | (output.preempted_req_ids or set())
        for name in gone:
            self.tables.pop(name, None)
        for name, left in output.trimmed.items():
            for table, num_blocks in zip(self.tables[name], left, strict=True):
                del table[num_blocks:]
        starts = {}
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = [list(ids) for ids in new.block_ids]
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            starts[name] = cached.num_computed_tokens[i]
            blocks = cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                self.tables[name] = [list(ids) for ids in blocks or ()]
            elif blocks is not None:
                for table, ids in zip(self.tables[name], blocks, strict=True):
                    table.extend(ids)
        names = list(output.num_scheduled_tokens)
        told = {name: self._decide(name, shares) for name in names if starts[name] == 0 and self._is_adaptive(name)}
        sampled = [[] if self.scheduler.requests[name].is_prefill_chunk else [7] for name in names]
        result = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)
        result.decided = told
        result.rows_run = {
            name: self._rows(name)
            for name, num_tokens in output.num_scheduled_tokens.items()
            if name in told or self._ends(name, starts[name], num_tokens)
        }
        return result

    def _is_adaptive(self, name: str) -> bool:
        return self.scheduler.records[name].prefill_plan.adaptive

    def _ends(self, name: str, start: int, num_tokens: int) -> bool:
        """Whether the end of a pruned prompt runs."""
        plan = self.scheduler.records[name].prefill_plan
        return plan.is_pruned and start < plan.num_prompt_tokens <= start + num_tokens

    def _rows(self, name: str) -> tuple[int, ...]:
        plan = self.scheduler.records[name].prefill_plan
        num_text = plan.num_prompt_tokens - plan.num_vision_tokens
        return tuple(num_text + sum(kept) for kept in self.decided.get(name, plan.kept))

    def _decide(self, name: str, shares: list[float]) -> tuple[tuple[int, ...], ...]:
        if name not in self.decided:
            plan = self.scheduler.records[name].prefill_plan
            left = [span.length for span in plan.spans]
            kept = []
            for stage, bound in enumerate(plan.kept):
                left = [min(int(n * shares[stage % len(shares)]), most) for n, most in zip(left, bound, strict=True)]
                kept.append(tuple(left))
            self.decided[name] = tuple(kept)
        return self.decided[name]


class Traffic(RuleBasedStateMachine):
    """Requests come, run, are preempted, aborted; reports arrive one step late at most."""

    make: Any
    hasher: Any
    delay: int

    def __init__(self) -> None:
        super().__init__()
        self.scheduler: StagedScheduler = self.make()
        self.worker = Worker(self.scheduler)
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.num_free = self.pool.get_num_free_blocks()
        self.number = 0

    @rule(
        text=st.integers(1, 40),
        images=st.integers(0, 2),
        ends_with_image=st.booleans(),
        off=st.booleans(),
        max_tokens=st.integers(1, 40),
    )
    def add(self, text: int, images: int, ends_with_image: bool, off: bool, max_tokens: int) -> None:
        self.number += 1
        offsets = [1 + i * TOKENS_PER_IMAGE for i in range(images)]
        tail = 0 if ends_with_image and images else text
        features = [
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=f"image{self.number}-{i}",
                mm_position=PlaceholderRange(offset=offset, length=TOKENS_PER_IMAGE),
            )
            for i, offset in enumerate(offsets)
        ]
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args={"hidrop": "off"} if off else None)
        tokens = [5 + self.number] * (1 + images * TOKENS_PER_IMAGE + tail)  # nothing that another could reuse
        request = Request(str(self.number), tokens, params, None, mm_features=features, block_hasher=self.hasher)
        self.scheduler.add_request(request)

    @rule(shares=st.lists(st.floats(0, 1), min_size=1, max_size=5))
    def step(self, shares: list[float]) -> None:
        output = self.scheduler.schedule()
        self.in_flight.append((output, self.worker.run(output, shares)))
        self.check_tables()
        while len(self.in_flight) > self.delay:
            self.deliver()

    @precondition(lambda self: self.in_flight)
    @rule()
    def deliver(self) -> None:
        output, result = self.in_flight.popleft()
        self.scheduler.update_from_output(output, result)
        for name in result.decided:
            self.check_exact(name)

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    @precondition(lambda self: self.scheduler.running)
    @rule()
    def preempt(self) -> None:
        request = self.scheduler.running.pop()
        self.scheduler._preempt_request(request, 0.0)

    def check_tables(self) -> None:
        """What the worker believes is what the scheduler holds, and a prompt has blocks for all it runs with."""
        output, result = self.in_flight[-1]
        for name in output.num_scheduled_tokens:
            held = [[block.block_id for block in manager.req_to_blocks[name]] for manager in self.managers]
            assert self.worker.tables[name] == held
        for name, kept in result.decided.items():
            plan = self.scheduler.records[name].prefill_plan
            for manager in self.managers:
                rows = plan.num_prompt_tokens - plan.num_vision_tokens + sum(kept[manager.kv_cache_spec.stage])
                assert len(manager.req_to_blocks[name]) >= -(-rows // BLOCK)

    def check_exact(self, name: str) -> None:
        """After a report, a request holds the blocks of what it keeps, no more."""
        request = self.scheduler.requests.get(name)
        if request is None or request.num_computed_tokens == 0:
            return
        record = self.scheduler.records[name]
        assert record.prefill_plan.kept == self.worker.decided[name]
        for manager in self.managers:
            tokens = record.plan.stage_tokens(manager.kv_cache_spec.stage, request.num_computed_tokens)
            assert len(manager.req_to_blocks[name]) == -(-tokens // BLOCK)

    @invariant()
    def blocks_are_conserved(self) -> None:
        tables = [blocks for manager in self.managers for blocks in manager.req_to_blocks.values()]
        held = [block.block_id for blocks in tables for block in blocks]
        assert len(held) == len(set(held)), "a block is in two tables"
        assert len(held) + self.pool.get_num_free_blocks() == self.num_free

    @invariant()
    def bounds_hold(self) -> None:
        for name, request in self.scheduler.requests.items():
            tokens = max(request.num_tokens, request.num_computed_tokens)
            for manager in self.managers:
                assert len(manager.req_to_blocks.get(name, ())) <= -(-tokens // BLOCK)

    def teardown(self) -> None:
        for _ in range(3 * NUM_BLOCKS * self.number + 10):
            if not self.scheduler.requests and not self.in_flight:
                break
            self.step([0.5])
            if not self.scheduler.requests:
                while self.in_flight:
                    self.deliver()
        assert not self.scheduler.requests, "a request starves"
        assert self.pool.get_num_free_blocks() == self.num_free
        assert not self.scheduler.records
        assert not self.scheduler.trimmed


@pytest.fixture(scope="module", params=sorted(CHOICES))
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What a scheduler is built from, of a real engine with a small pool."""
    model = make_llava(tmp_path_factory.mktemp("llava"))
    # Requests that decide nothing would share cached blocks, which the invariants below do not know.
    limits = LIMITS | {"enable_prefix_caching": request.param != "hidrop"}
    with engine(model, CHOICES[request.param], **limits) as one:
        of_scheduler = one.core.vllm_config, one.scheduler.kv_cache_config, one.scheduler.structured_output_manager
        yield of_scheduler, one.core.request_block_hasher


@pytest.mark.parametrize("is_v2", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize(("kind", "delay"), [(StagedScheduler, 0), (StagedAsyncScheduler, 1)])
def test_no_block_is_lost_or_freed_twice(parts: Any, kind: type[StagedScheduler], delay: int, is_v2: bool) -> None:
    class Here(Traffic):
        pass

    Here.delay = delay
    of_scheduler, hasher = parts
    Here.hasher = staticmethod(hasher)

    def make() -> StagedScheduler:
        scheduler = kind(*of_scheduler, block_size=BLOCK)
        scheduler.use_v2_model_runner = is_v2
        return scheduler

    Here.make = staticmethod(make)
    machine = Here.TestCase
    machine.settings = settings(
        max_examples=40,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    machine().runTest()
