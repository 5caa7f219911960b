"""Every stage's own paged KV cache: spec and manager.

vLLM groups layers of equal spec and gives each group its own block tables from one shared pool. A :class:`StageSpec`
carries its stage, so stages become groups; a :class:`StageManager` counts the tokens its stage holds instead of the
tokens of the request.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_hidrop.engine.compat import subclass
from vllm_hidrop.engine.records import Record


@dataclass(frozen=True, kw_only=True)
class StageSpec(FullAttentionSpec):
    """A full-attention layer's cache format plus the stage it belongs to."""

    stage: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, stage: int) -> Self:
        """The same format, in a stage."""
        return cls(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init}, stage=stage)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merge equal specs only: layers of two stages must not share a block table."""
        assert all(spec == specs[0] for spec in specs), "layers of different stages cannot share a KV cache group"
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers are of this stage."""
        return all(isinstance(spec, StageSpec) and spec.stage == self.stage for spec in kv_cache_specs.values())


class StageManager(FullAttentionManager):
    """Allocates blocks for the tokens a stage really holds.

    ::

        request   t t t v v v v v v t t | o o      t text, v vision, o generated
        stage 0   t t t t t | o o                  -> ceil(7 / block_size) blocks
        stage 1   t t t v v v v v v t t | o o      -> ceil(13 / block_size) blocks
    """

    records: Mapping[str, Record] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fresh: set[int] = set()
        """Ids of the blocks that this step allocated: nothing is in them before it has run."""

    def new_step_starts(self) -> None:
        """What earlier steps allocated is written."""
        super().new_step_starts()
        self.fresh.clear()

    def follow(self, records: Mapping[str, Record]) -> None:
        """Count by the plans in these records, which the scheduler keeps by request id."""
        self.records = records

    def _stage_tokens(self, request_id: str, num_tokens: int) -> int:
        record = self.records.get(request_id)
        return num_tokens if record is None else record.plan.stage_tokens(self.kv_cache_spec.stage, num_tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """The count of vLLM, for this stage's share of the tokens."""
        total, local, main = (
            self._stage_tokens(request_id, count)
            for count in (total_computed_tokens, num_local_computed_tokens, num_tokens_main_model)
        )
        stage_tokens = self._stage_tokens(request_id, num_tokens)
        return super().get_num_blocks_to_allocate(
            request_id, stage_tokens, new_computed_blocks, total, local, main, *args, **kwargs
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """The blocks of a hit; of one that this stage's share ends within, vLLM copies the page for the request."""
        stage_tokens = self._stage_tokens(request_id, num_local_computed_tokens)
        super().add_local_computed_blocks(request_id, new_computed_blocks, stage_tokens, num_external_computed_tokens)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """The allocation of vLLM, for this stage's share of ``num_tokens``."""
        stage_tokens = self._stage_tokens(request_id, num_tokens)
        blocks = super().allocate_new_blocks(request_id, stage_tokens, stage_tokens)
        self.fresh.update(block.block_id for block in blocks)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """The caching of vLLM; of a pruned request only blocks within its prefix, where slots are prompt places."""
        record = self.records.get(request.request_id)
        if record is not None and record.plan.is_pruned:
            num_tokens = min(num_tokens, record.plan.prefix_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def trim(self, request_id: str, num_tokens: int) -> int:
        """Free the blocks beyond those for this stage's share of ``num_tokens``; return how many."""
        blocks = self.req_to_blocks[request_id]
        num_needed = cdiv(self._stage_tokens(request_id, num_tokens), self.block_size)
        tail = blocks[num_needed:]
        del blocks[num_needed:]
        self.block_pool.free_blocks(reversed(tail))
        return len(tail)


def block_size_of(kv_cache_config: Any) -> int:
    """Slots of a block in every group: plans are counted in it, by scheduler and worker alike.

    The configuration's own number is not final before the caches are made: an attention backend may choose another.

    Raises:
        ValueError: groups differ.
    """
    sizes = {group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups}
    if len(sizes) != 1:
        raise ValueError(
            f"all stages must have KV blocks of one size, this engine has {sorted(sizes)}: set --block-size"
        )
    return int(sizes.pop())


def register_stage_spec() -> None:
    """Make the spec known in this process; idempotent.

    The built-in specs must come first: ours in an empty registry would leave them unknown in this process.
    """
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(StageSpec, StageManager, uniform_type_base_spec=StageSpec)


class StagedCacheManager(KVCacheManager):
    """vLLM's manager, which knows how far each request's tables reach; see :func:`count_by`.

    Decode steps that need no block anywhere ask no stage's manager: vLLM asks every KV cache group twice per request
    and step, which with a group per few layers is most of a scheduler step (docs/performance.md).
    """

    records: Mapping[str, Record]
    reach: dict[str, int]
    """By request whose prompt has run: tokens up to which no table needs a block and no block fills."""

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, num_lookahead_tokens: int = 0, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """The allocation of vLLM, or at once nothing where nothing is needed."""
        name = request.request_id
        num_tokens = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
        if num_tokens < self.reach.get(name, 0):
            return self.empty_kv_cache_blocks
        found = super().allocate_slots(
            request, num_new_tokens, *args, num_lookahead_tokens=num_lookahead_tokens, **kwargs
        )
        if found is not None and num_tokens >= self.records[name].plan.num_prompt_tokens:
            self.reach[name] = self._reach(name)
        return found

    def _reach(self, name: str) -> int:
        dropped = self.records[name].plan.dropped
        managers = self.coordinator.single_type_managers
        return min(len(m.req_to_blocks[name]) * m.block_size + dropped[m.kv_cache_spec.stage] for m in managers)

    def free(self, request: Request) -> None:
        """The freeing of vLLM."""
        self.forget(request.request_id)
        super().free(request)

    def forget(self, name: str) -> None:
        """A request's tables, or what its plan says of them, have changed otherwise."""
        self.reach.pop(name, None)


def count_by(manager: KVCacheManager, records: Mapping[str, Record]) -> None:
    """Make a freshly constructed manager ours, and its stages' managers count by these records, by request id."""
    why = "the scheduler's constructor names its cache manager's class; until it takes one"
    subclass(manager, StagedCacheManager, why=why, records=records, reach={})
    for of_group in manager.coordinator.single_type_managers:
        assert isinstance(of_group, StageManager)
        of_group.follow(records)
