"""Whether the scheduler's books add up: the block pool, requests' block tables and plans, the encoder cache.

The whole pool is walked when an idle engine is asked whether it is ready. When the engine becomes idle, and the next
request may be arriving, only counts are compared and a sample of blocks looked at, the next ones each time.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_hidrop.engine.kv_cache import StageManager
from vllm_hidrop.engine.records import Record

MAX_FINDINGS = 20
"""Most findings of one check: one mistake can show in every block."""
SAMPLE_BLOCKS = 1000
"""Blocks looked at when the engine becomes idle."""


@dataclass
class IntegrityLog:
    """The results of a scheduler's checks.

    Attributes:
        num_failed: checks that found a fault.
        findings: faults of the last check that found any; they stay, because books that once were wrong are not trusted
            again before a restart.
        is_due: whether the engine has run since the last check.
        next_block: id of the block where the next sample begins.
    """

    num_checks: int = 0
    num_failed: int = 0
    findings: list[str] = field(default_factory=list)
    is_due: bool = False
    next_block: int = 0

    def record(self, findings: list[str]) -> None:
        """Count one check."""
        self.num_checks += 1
        self.is_due = False
        if findings:
            self.num_failed += 1
            self.findings = findings

    def sample(self, scheduler: Any) -> bool:
        """Whether a look at the next sample of an idle scheduler finds a fault; a check then names it."""
        self.is_due = True
        num_blocks = len(scheduler.kv_cache_manager.block_pool.blocks)
        first, self.next_block = self.next_block, (self.next_block + SAMPLE_BLOCKS) % num_blocks
        return not _idle_books_add_up(scheduler, range(first, min(first + SAMPLE_BLOCKS, num_blocks)))

    def dump(self) -> dict[str, Any]:
        """The results as JSON values, to be sent between processes."""
        return {"checks": self.num_checks, "failed_checks": self.num_failed, "findings": self.findings}


def find_faults(scheduler: Any) -> list[str]:
    """The faults of a ``StagedScheduler`` between two steps, one line each, at most :data:`MAX_FINDINGS`."""
    faults = (_block_faults(scheduler), _request_faults(scheduler), _encoder_faults(scheduler))
    return list(islice((fault for some in faults for fault in some), MAX_FINDINGS))


def _idle_books_add_up(scheduler: Any, sample: Iterable[int]) -> bool:
    """Whether all blocks are free by the pool's count, the sample's by its list, and nothing else shows a fault."""
    pool = scheduler.kv_cache_manager.block_pool
    deferred = sum(len(blocks) for _, blocks in scheduler.deferred_frees)
    if pool.get_num_free_blocks() + deferred != pool.num_gpu_blocks - 1:
        return False
    if any(_request_faults(scheduler)) or any(_encoder_faults(scheduler)):
        return False
    return bool(deferred) or all(_is_free(pool.blocks[block_id]) for block_id in sample)


def _is_free(block: Any) -> bool:
    """Whether a block has no references and is linked into the free list; the null block must not be linked."""
    after, before = block.next_free_block, block.prev_free_block
    if block.is_null:
        return after is None and before is None
    if block.ref_cnt or after is None or before is None:
        return False
    return after.prev_free_block is block is before.next_free_block


def _managers(scheduler: Any) -> tuple[Any, ...]:
    managers: tuple[Any, ...] = scheduler.kv_cache_manager.coordinator.single_type_managers
    return managers


def _block_faults(scheduler: Any) -> Iterator[str]:
    """Faults against: a block is in as many tables as it has references; without any, it is in the free list, once."""
    pool = scheduler.kv_cache_manager.block_pool
    tables: Counter[int] = Counter()
    groups: dict[int, int] = {}
    for group, manager in enumerate(_managers(scheduler)):
        for request_id, blocks in manager.req_to_blocks.items():
            held = [block.block_id for block in blocks if not block.is_null]
            if len(set(held)) < len(held):
                yield f"request {request_id} holds a block twice in group {group}"
            tables.update(held)
            for block_id in held:
                if groups.setdefault(block_id, group) != group:
                    yield f"block {block_id} stands in tables of groups {groups[block_id]} and {group}"
    tables.update(block.block_id for _, blocks in scheduler.deferred_frees for block in blocks)
    if _adds_up(pool, tables):
        return
    free = Counter(block.block_id for block in _free_list(pool))
    for block in pool.blocks:
        if not block.is_null:
            yield from _faults_of(block, tables[block.block_id], free[block.block_id], pool.enable_caching)
    if pool.null_block.block_id in free:
        yield "the null block is free"
    if free.total() != pool.get_num_free_blocks():
        yield f"the free list has {free.total()} blocks and says {pool.get_num_free_blocks()}"


def _adds_up(pool: Any, tables: Mapping[int, int]) -> bool:
    """Whether every block is in one table or once in the free list: the quick look, which names no fault."""
    queue = pool.free_block_queue
    block, tail = queue.fake_free_list_head.next_free_block, queue.fake_free_list_tail
    num_free = 0  # a list that can be walked to its end has no block twice
    while block is not tail:
        if block is None or block.ref_cnt or block.is_null or num_free > pool.num_gpu_blocks:
            return False
        num_free += 1
        block = block.next_free_block
    held_once = all(num == 1 == pool.blocks[block_id].ref_cnt for block_id, num in tables.items())
    counted = num_free == pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 - len(tables)
    return held_once and counted


def _free_list(pool: Any) -> Iterator[Any]:
    """The blocks of the free list in order, at most as many as the pool has: a broken list may be a ring."""
    queue = pool.free_block_queue
    block = queue.fake_free_list_head.next_free_block
    for _ in range(pool.num_gpu_blocks + 1):
        if block is None or block is queue.fake_free_list_tail:
            return
        yield block
        block = block.next_free_block


def _faults_of(block: Any, num_tables: int, num_free: int, caching: bool) -> Iterator[str]:
    if block.ref_cnt != num_tables:
        yield f"block {block.block_id} has {block.ref_cnt} references and stands in {num_tables} tables"
    if num_free != (num_tables == 0):
        yield f"block {block.block_id} stands in {num_tables} tables and {num_free} times in the free list"
    if num_tables > 1 and not (caching and block.block_hash is not None):
        yield f"block {block.block_id} stands in {num_tables} tables and is not cached"


def _request_faults(scheduler: Any) -> Iterator[str]:
    """Faults against: every record is of a living request, and a request holds the blocks of its plan."""
    known = scheduler.requests.keys()
    by_request = {
        "the records": scheduler.records,
        "the trimmed tables": scheduler.trimmed,
        "the reused prefixes": scheduler.prefixes.hits,
        "the prefixes being kept": scheduler.prefixes.storing,
        "the running": {request.request_id for request in scheduler.running},
    }
    for name, records in by_request.items():
        yield from _unknown(records, known, name)
    for request_id in known - scheduler.records.keys():
        yield f"request {request_id} has no record"
    for group, manager in enumerate(_managers(scheduler)):
        yield from _unknown(manager.req_to_blocks, known, f"the block tables of group {group}")
        for request_id, blocks in manager.req_to_blocks.items():
            request, record = scheduler.requests.get(request_id), scheduler.records.get(request_id)
            expected = None if request is None or record is None else _expected_blocks(manager, request, record)
            if expected is not None and len(blocks) != expected:
                yield f"request {request_id} holds {len(blocks)} blocks in group {group}, its plan says {expected}"


def _expected_blocks(manager: Any, request: Any, record: Record) -> int | None:
    """The blocks that a request holds in a group by its plan, one for its states; None where vLLM alone knows."""
    num_tokens = request.num_computed_tokens
    if isinstance(manager, StageManager):
        return cdiv(record.plan.stage_tokens(manager.kv_cache_spec.stage, num_tokens), manager.block_size)
    is_state = isinstance(manager.kv_cache_spec, MambaSpec) and manager.kv_cache_spec.mamba_cache_mode == "none"
    return min(num_tokens, 1) if is_state else None


def _unknown(records: Iterable[str], known: Iterable[str], what: str) -> Iterator[str]:
    for request_id in set(records).difference(known):
        yield f"{what} know a request {request_id} that there is not"


def _encoder_faults(scheduler: Any) -> Iterator[str]:
    """Faults against: every slot of the encoder cache is in use, freeable or free."""
    cache = scheduler.encoder_cache_manager
    if type(cache) is not EncoderCacheManager:
        return
    if cache.cached.keys() != cache.num_embeds_by_hash.keys():
        yield "the encoder cache has sizes of other images than it holds"
    taken = sum(cache.num_embeds_by_hash.values())
    if taken + cache.num_free_slots != cache.cache_size:
        yield f"the encoder cache holds {taken}, has {cache.num_free_slots} free, and is of {cache.cache_size}"
    unused = {image for image, users in cache.cached.items() if not users}
    if unused != cache.freeable.keys():
        yield "the encoder cache could free other images than those nobody uses"
    if cache.num_freeable_slots != cache.num_free_slots + sum(cache.freeable.values()):
        yield f"the encoder cache could free {cache.num_freeable_slots} by its own word, not by its entries"
    users = {request_id for names in cache.cached.values() for request_id in names}
    yield from _unknown({*users, *cache.request_cached_ids}, scheduler.requests, "the encoder cache's entries")
