"""The integrity check: clean at every step of mixed traffic, and it sees every kind of corruption we can think of."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.v1.engine.core import EngineCore

from tests.engine.harness import Ask, Engine, engine, prompt
from vllm_hidrop.engine import integrity as integrity_module
from vllm_hidrop.engine import scheduler as scheduler_module
from vllm_hidrop.engine.compat import INTEGRITY_CALL
from vllm_hidrop.engine.integrity import MAX_FINDINGS, IntegrityLog
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

HIDROP = {"method": "hidrop", "preset": "tok48", "options": {"scale": True}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = make_llava(tmp_path_factory.mktemp("llava"), "mistral")
    with engine(model, HIDROP) as started:
        yield started


@pytest.fixture
def busy(running: Engine) -> Iterator[Engine]:
    """In the middle of two requests, whose books are put right at the end."""
    rng = np.random.default_rng(0)
    running.add("a", Ask(prompt(rng, "9ii9"), (1, 2), max_tokens=20))
    running.add("b", Ask(prompt(rng, "99"), max_tokens=20))
    running.step()
    assert running.scheduler.check_integrity() == []
    yield running
    while running.scheduler.requests:
        running.step()
    assert running.scheduler.check_integrity() == []


Undo = Callable[[], Any]


def first_table(running: Engine) -> list[Any]:
    """Blocks of one request in one group."""
    manager = running.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    blocks: list[Any] = next(iter(manager.req_to_blocks.values()))
    return blocks


def add_reference(running: Engine) -> Undo:
    block = first_table(running)[0]
    block.ref_cnt += 1
    return lambda: setattr(block, "ref_cnt", 1)


def free_a_held_block(running: Engine) -> Undo:
    block = first_table(running)[0]
    running.pool.free_block_queue.append(block)
    return lambda: running.pool.free_block_queue.remove(block)


def leak_a_block(running: Engine) -> Undo:
    block = running.pool.free_block_queue.popleft()
    return lambda: running.pool.free_block_queue.append(block)


def share_a_block(running: Engine) -> Undo:
    managers = running.scheduler.kv_cache_manager.coordinator.single_type_managers
    tables = list(managers[0].req_to_blocks.values())
    block, replaced = tables[0][0], tables[1][0]
    tables[1][0], block.ref_cnt, replaced.ref_cnt = block, 2, 0
    running.pool.free_block_queue.append(replaced)

    def undo() -> None:
        running.pool.free_block_queue.remove(replaced)
        tables[1][0], block.ref_cnt, replaced.ref_cnt = replaced, 1, 1

    return undo


def share_between_groups(running: Engine) -> Undo:
    managers = running.scheduler.kv_cache_manager.coordinator.single_type_managers
    table = next(iter(managers[1].req_to_blocks.values()))
    table.append(first_table(running)[0])
    return table.pop


def take_a_block_more(running: Engine) -> Undo:
    table = first_table(running)
    table.extend(running.pool.get_new_blocks(1))
    return lambda: running.pool.free_blocks([table.pop()])


def close_the_free_list_to_a_ring(running: Engine) -> Undo:
    queue = running.pool.free_block_queue
    last = queue.fake_free_list_tail.prev_free_block
    last.next_free_block = queue.fake_free_list_head.next_free_block
    return lambda: setattr(last, "next_free_block", queue.fake_free_list_tail)


def miscount_free_blocks(running: Engine) -> Undo:
    queue = running.pool.free_block_queue
    queue.num_free_blocks -= 1
    return lambda: setattr(queue, "num_free_blocks", queue.num_free_blocks + 1)


def keep_a_record(running: Engine) -> Undo:
    records = running.scheduler.records
    records["ghost"] = next(iter(records.values()))
    return lambda: records.pop("ghost")


def keep_a_table(running: Engine) -> Undo:
    tables = running.scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks
    tables["ghost"] = []
    return lambda: tables.pop("ghost")


def lose_encoder_space(running: Engine) -> Undo:
    cache = running.scheduler.encoder_cache_manager
    cache.num_free_slots -= 1
    return lambda: setattr(cache, "num_free_slots", cache.num_free_slots + 1)


def keep_an_image_for_nobody(running: Engine) -> Undo:
    users = next(iter(running.scheduler.encoder_cache_manager.cached.values()))
    users.add("ghost")
    running.scheduler.encoder_cache_manager.request_cached_ids["ghost"] = {0}

    def undo() -> None:
        users.discard("ghost")
        del running.scheduler.encoder_cache_manager.request_cached_ids["ghost"]

    return undo


CORRUPTIONS: dict[Callable[[Engine], Undo], str] = {
    add_reference: "has 2 references and stands in 1 tables",
    free_a_held_block: "stands in 1 tables and 1 times in the free list",
    leak_a_block: "stands in 0 tables and 0 times in the free list",
    share_a_block: "stands in 2 tables and is not cached",
    share_between_groups: "stands in tables of groups 0 and 1",
    take_a_block_more: "its plan says",
    close_the_free_list_to_a_ring: "times in the free list",
    miscount_free_blocks: "the free list has",
    keep_a_record: "the records know a request ghost that there is not",
    keep_a_table: "the block tables of group 0 know a request ghost",
    lose_encoder_space: "the encoder cache holds",
    keep_an_image_for_nobody: "encoder cache",
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_every_corruption_is_found_and_logged(
    busy: Engine, corrupt: Callable[[Engine], Undo], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(scheduler_module.logger, "error", lambda text, *args: logged.append(text % args))
    undo = corrupt(busy)
    try:
        faults = busy.scheduler.check_integrity()
    finally:
        undo()
    assert any(CORRUPTIONS[corrupt] in fault for fault in faults), faults
    assert len(faults) <= MAX_FINDINGS
    assert logged == [f"integrity: {fault}" for fault in faults]


def test_the_check_runs_when_the_engine_becomes_idle_and_what_it_found_stays(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module.logger, "error", lambda *args: None)
    ask = Ask(prompt(np.random.default_rng(1), "5i5"), (1,))
    log = running.scheduler.integrity = IntegrityLog()
    running.ask([ask, ask])
    assert not log.is_due, "no step has run since the last answer"
    running.step()
    assert log.is_due
    assert log.num_checks == 0, "nobody has asked, and the sample was clean"
    asked = getattr(EngineCore, INTEGRITY_CALL)
    assert [asked(running.core)["checks"] for _ in range(3)] == [1, 1, 1]
    block = running.pool.free_block_queue.popleft()
    running.ask([ask])
    running.step()
    assert log.num_failed == 1, "a sample that finds something is followed by a check"
    running.pool.free_block_queue.append(block)
    running.ask([ask])
    running.step()
    told = asked(running.core)
    assert told["checks"] == 3
    assert told["failed_checks"] == 1
    assert told["findings"] == [f"block {block.block_id} stands in 0 tables and 0 times in the free list"]
    running.scheduler.integrity = IntegrityLog()


def refer_to_a_free_block(running: Engine) -> Undo:
    block = running.pool.blocks[5]
    block.ref_cnt += 1
    return lambda: setattr(block, "ref_cnt", 0)


def take_a_block_out_of_the_middle(running: Engine) -> Undo:
    block = running.pool.blocks[6]
    before, after = block.prev_free_block, block.next_free_block
    before.next_free_block, after.prev_free_block = after, before

    def undo() -> None:
        before.next_free_block = after.prev_free_block = block

    return undo


AT_REST = [leak_a_block, miscount_free_blocks, refer_to_a_free_block, take_a_block_out_of_the_middle]
AT_REST += [close_the_free_list_to_a_ring, lose_encoder_space]


@pytest.mark.parametrize("corrupt", AT_REST, ids=lambda corrupt: corrupt.__name__)
def test_the_samples_of_an_idle_engine_come_to_every_block(
    running: Engine, corrupt: Callable[[Engine], Undo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity_module, "SAMPLE_BLOCKS", 7)
    log = IntegrityLog()
    num_samples = -(-len(running.pool.blocks) // 7)
    assert not any(log.sample(running.scheduler) for _ in range(2 * num_samples))
    undo = corrupt(running)
    try:
        assert any(log.sample(running.scheduler) for _ in range(num_samples))
        assert running.scheduler.check_integrity(), "the sample finds nothing that the check would not"
    finally:
        undo()
    assert not any(log.sample(running.scheduler) for _ in range(2 * num_samples))


def test_what_an_idle_engine_looks_at_does_not_grow_with_the_pool(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(list[Any]):
        num_read = 0

        def __getitem__(self, index: Any) -> Any:
            self.num_read += 1
            return super().__getitem__(index)

        def __iter__(self) -> Any:
            raise AssertionError("the whole pool was walked")

    monkeypatch.setattr(integrity_module, "SAMPLE_BLOCKS", 7)
    blocks = Counting(running.pool.blocks)
    monkeypatch.setattr(running.pool, "blocks", blocks)
    log = IntegrityLog()
    assert not log.sample(running.scheduler)
    assert blocks.num_read == 7
    assert log.next_block == 7


def test_books_add_up_at_every_step_of_mixed_traffic(tmp_path: Path) -> None:
    model = make_llava(tmp_path, "mistral")
    rng = np.random.default_rng(2)
    wishes: list[dict[str, Any]] = [{}, {"hidrop": "off"}, {"hidrop_method": "random"}]
    asks = [
        Ask(prompt(rng, layout), tuple(range(layout.count("i"))), wishes[i % 3], max_tokens=20 + i)
        for i, layout in enumerate(["3i5", "9ii9", "99", "i9", "5i5i5", "9", "3i4", "i5"])
    ]
    server = {"method": "fastv", "options": {"layer": 2}}
    with engine(model, server, num_gpu_blocks_override=40, max_model_len=256, max_num_batched_tokens=256) as tight:
        for i, ask in enumerate(asks):
            tight.add(f"r{i}", ask)
        for step in range(500):
            tight.step()
            assert tight.scheduler.check_integrity() == [], f"step {step}"
            if step == 7:
                tight.llm.llm_engine.abort_request(["r2", "r4"])
                assert tight.scheduler.check_integrity() == []
            if not tight.scheduler.requests:
                break
        assert not tight.scheduler.requests
