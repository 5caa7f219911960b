"""Every stage's own paged KV cache: spec and manager.

vLLM groups layers of equal spec and gives each group its own block tables from one shared pool. A :class:`StageSpec`
carries its stage, so stages become groups; a :class:`StageManager` counts the tokens its stage holds instead of the
tokens of the request.
"""

from collections.abc import Iterable, Mapping, Sequence
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
    """A full-attention layer's cache format, and the index of the stage that the layer belongs to."""

    stage: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, stage: int) -> Self:
        """The format of ``spec``, in a stage."""
        return cls(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init}, stage=stage)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merge equal specs only: layers of two stages must not share a block table."""
        assert all(spec == specs[0] for spec in specs), "layers of different stages cannot share a KV cache group"
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all these layers are of this stage."""
        return all(isinstance(spec, StageSpec) and spec.stage == self.stage for spec in kv_cache_specs.values())


class StageManager(FullAttentionManager):
    """Allocates blocks for the tokens that a stage holds.

    ::

        request   t t t v v v v v v t t | o o      t text, v vision, o generated
        stage 0   t t t t t | o o                  -> ceil(7 / block_size) blocks
        stage 1   t t t v v v v v v t t | o o      -> ceil(13 / block_size) blocks
    """

    records: Mapping[str, Record] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fresh: set[int] = set()
        """Ids of the blocks allocated in this step, which are empty until it has run."""

    def new_step_starts(self) -> None:
        """Forget the fresh blocks: the last step has written them."""
        super().new_step_starts()
        self.fresh.clear()

    def follow(self, records: Mapping[str, Record]) -> None:
        """Count by the plans in the scheduler's records, by request id."""
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
        """The blocks that vLLM would allocate for this stage's tokens."""
        stage_tokens, computed, local, main = (
            self._stage_tokens(request_id, count)
            for count in (num_tokens, total_computed_tokens, num_local_computed_tokens, num_tokens_main_model)
        )
        return super().get_num_blocks_to_allocate(
            request_id, stage_tokens, new_computed_blocks, computed, local, main, *args, **kwargs
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Add the blocks of a prefix-cache hit; vLLM copies the page of a block that this stage's tokens end within."""
        stage_tokens = self._stage_tokens(request_id, num_local_computed_tokens)
        super().add_local_computed_blocks(request_id, new_computed_blocks, stage_tokens, num_external_computed_tokens)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Allocate as vLLM does, for this stage's tokens among the request's first ``num_tokens``."""
        stage_tokens = self._stage_tokens(request_id, num_tokens)
        blocks = super().allocate_new_blocks(request_id, stage_tokens, stage_tokens)
        self.fresh.update(block.block_id for block in blocks)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Cache as vLLM does; of a pruned request only blocks within its prefix, where slots are prompt places."""
        record = self.records.get(request.request_id)
        if record is not None and record.plan.is_pruned:
            num_tokens = min(num_tokens, record.plan.prefix_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def trim(self, request_id: str, num_tokens: int) -> int:
        """Free the blocks that this stage's tokens among the first ``num_tokens`` do not need; return how many."""
        blocks = self.req_to_blocks[request_id]
        num_needed = cdiv(self._stage_tokens(request_id, num_tokens), self.block_size)
        tail = blocks[num_needed:]
        del blocks[num_needed:]
        self.block_pool.free_blocks(reversed(tail))
        return len(tail)


def block_size_of(kv_cache_config: Any) -> int:
    """Slots of a KV block, by which scheduler and worker count plans; ValueError where groups differ.

    Read once the caches are made: until then an attention backend may choose another size than the configuration's. A
    block of recurrent layers holds a request's state, however many tokens it has.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    sizes = {spec.block_size for spec in specs if isinstance(spec, StageSpec)}
    if len(sizes) != 1:
        raise ValueError(
            f"all stages must have KV blocks of one size, this engine has {sorted(sizes)}: set --block-size"
        )
    return int(sizes.pop())


def register_stage_spec() -> None:
    """Register the spec in this process; idempotent.

    vLLM's own specs must come first: it registers them in this process only while the registry is empty.
    """
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(StageSpec, StageManager, uniform_type_base_spec=StageSpec)


class StagedCacheManager(KVCacheManager):
    """vLLM's manager, which allocates nothing without asking the stages' managers where nothing is needed.

    vLLM asks every KV cache group twice per request and step, which with a group per few layers is most of a scheduler
    step (docs/performance.md); most decode steps need no block in any group. Made by :func:`count_by`.
    """

    records: Mapping[str, Record]
    num_covered: dict[str, int]
    """By id of a request whose prompt has run: with fewer tokens than this it needs no further block, nor fills one."""

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, num_lookahead_tokens: int = 0, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """Allocate as vLLM does, or return no block at once where the request's blocks cover its tokens."""
        request_id = request.request_id
        num_tokens = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
        if num_tokens < self.num_covered.get(request_id, 0):
            return self.empty_kv_cache_blocks
        blocks = super().allocate_slots(
            request, num_new_tokens, *args, num_lookahead_tokens=num_lookahead_tokens, **kwargs
        )
        if blocks is not None and num_tokens >= self.records[request_id].plan.num_prompt_tokens:
            self.num_covered[request_id] = self._num_covered(request_id)
        return blocks

    def _num_covered(self, request_id: str) -> int:
        dropped = self.records[request_id].plan.dropped
        managers = stage_managers(self.coordinator.single_type_managers)
        return min(len(m.req_to_blocks[request_id]) * m.block_size + dropped[m.kv_cache_spec.stage] for m in managers)

    def free(self, request: Request) -> None:
        """Free as vLLM does."""
        self.forget(request.request_id)
        super().free(request)

    def forget(self, request_id: str) -> None:
        """Forget how many tokens a request's blocks cover: its blocks or its plan have changed."""
        self.num_covered.pop(request_id, None)


def count_by(manager: KVCacheManager, records: Mapping[str, Record]) -> None:
    """Make vLLM's freshly constructed manager ours, counting by the scheduler's records, by request id."""
    why = "the scheduler's constructor names its cache manager's class; until it takes one"
    subclass(manager, StagedCacheManager, why=why, records=records, num_covered={})
    for of_group in stage_managers(manager.coordinator.single_type_managers):
        of_group.follow(records)


def stage_managers(managers: Iterable[Any]) -> list[StageManager]:
    """Those of vLLM's managers, one per KV cache group, that hold a stage's K and V; the others hold states."""
    return [manager for manager in managers if isinstance(manager, StageManager)]
