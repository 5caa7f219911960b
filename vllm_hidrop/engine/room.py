"""Decode steps that need no block anywhere ask no stage's manager.

vLLM asks every KV cache group twice per request and step; with a group per few layers that is most of a scheduler step
(docs/performance.md).
"""

from collections.abc import Mapping
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from vllm_hidrop.engine.kv_cache import StageManager
from vllm_hidrop.pruning import Plan


class StagedCacheManager(KVCacheManager):
    """vLLM's manager, which knows how far each request's tables reach; state is set by :func:`adopt_cache_manager`."""

    plans: Mapping[str, Plan]
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
        if found is not None and num_tokens >= self.plans[name].num_prompt_tokens:
            self.reach[name] = self._reach(name)
        return found

    def _reach(self, name: str) -> int:
        dropped = self.plans[name].dropped
        managers = self.coordinator.single_type_managers
        return min(len(m.req_to_blocks[name]) * m.block_size + dropped[m.kv_cache_spec.stage] for m in managers)

    def free(self, request: Request) -> None:
        """The freeing of vLLM."""
        self.forget(request.request_id)
        super().free(request)

    def forget(self, name: str) -> None:
        """A request's tables, or what its plan says of them, have changed otherwise."""
        self.reach.pop(name, None)


def adopt_cache_manager(manager: KVCacheManager, plans: Mapping[str, Plan]) -> None:
    """Make a freshly constructed manager ours, and its stages' managers follow these plans, by request id."""
    manager.__class__ = StagedCacheManager
    assert isinstance(manager, StagedCacheManager)
    manager.plans, manager.reach = plans, {}
    for of_group in manager.coordinator.single_type_managers:
        assert isinstance(of_group, StageManager)
        of_group.follow(plans)
