"""Closing up a request's KV cache: the slots that stay move to its first slots, inside its own blocks.

How a page stores slots is learnt by writing some, so this works for every cache layout and dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.schedule import Cached
from vllm_hidrop.staged.step import Survivors

DIGITS = 8
"""Whole numbers up to 8 are exact in every cache dtype, both kinds of fp8 included."""


@dataclass(frozen=True)
class SlotLayout:
    """Where each slot's K and V stand in a page, the same for every head and block.

    In every method ``cache`` is [blocks, G, slots, 2 * D], the pages of all requests, of any strides, and ``blocks``
    int32 [B], one request's block ids in order; all tensors are on the cache's device.

    Attributes:
        elements: int64 [slots, 2 * D], for every slot the places of its elements in one head's page, counted row by
            row of 2 * D, however the rows lie in memory.
    """

    elements: torch.Tensor

    @classmethod
    def of(cls, attention: Any) -> "SlotLayout":
        """Learn the layout of an attention module's cache from scratch pages; ValueError where it cannot be learnt.

        Elements are numbered and written through the module, one scratch page per digit, as a dtype holds few numbers
        exactly; what stands at each place of the pages is the number of the element stored there.
        """
        cache = attention.kv_cache
        num_heads, block_size = cache.shape[1], cache.shape[2]
        head_size = attention.head_size
        numbers = torch.arange(block_size * 2 * head_size, device=cache.device).view(block_size, 2 * head_size)
        found = numbers.new_zeros(block_size * 2 * head_size)
        place_value = 1
        while place_value <= int(numbers[-1, -1]):
            digits = (numbers // place_value % DIGITS).to(attention.dtype)
            rows = digits[:, None].expand(-1, num_heads, -1)
            key, value = rows[..., :head_size].contiguous(), rows[..., head_size:].contiguous()
            page = torch.zeros_like(cache[:1])
            slots = torch.arange(block_size, device=cache.device)
            attention.impl.do_kv_cache_update(attention, key, value, page, slots)
            stored = page[0, 0].flatten()
            found += torch.unique(stored.float(), return_inverse=True)[1] * place_value
            place_value *= DIGITS
        order = found.argsort()
        if not torch.equal(found[order], numbers.flatten()):
            raise ValueError("this KV cache layout cannot be closed up: a page does not hold each element once")
        return cls(order.view(block_size, 2 * head_size))

    def read_keys(self, cache: torch.Tensor, blocks: torch.Tensor, num_slots: int) -> torch.Tensor:
        """K of a request's first slots, [num_slots, G * D] in the cache's dtype."""
        slots = torch.arange(num_slots, device=cache.device)
        return cache[self._index(cache, blocks, slots, cache.shape[3] // 2)].flatten(1)

    def change_keys(
        self,
        cache: torch.Tensor,
        blocks: torch.Tensor,
        num_slots: int,
        change: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Replace K of a request's first slots, [num_slots, G, D], by ``change`` of it, in place."""
        slots = torch.arange(num_slots, device=cache.device)
        index = self._index(cache, blocks, slots, cache.shape[3] // 2)
        cache[index] = change(cache[index])

    def close_up(self, cache: torch.Tensor, blocks: torch.Tensor, source: torch.Tensor) -> None:
        """Move the slots ``source``, int64 [n], ascending, of a request to its slots 0 to n - 1, in place."""
        target = torch.arange(len(source), device=cache.device)
        cache[self._index(cache, blocks, target)] = cache[self._index(cache, blocks, source)]

    def _index(
        self, cache: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor, width: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Index of the first ``width`` elements (None: all) of a request's slots, int64 [n]: it gives [n, G, width].

        In four dimensions, not in flattened pages: vLLM permutes caches (heads before slots, K and V apart), and a
        permuted cache has no flat view.
        """
        block_size = self.elements.shape[0]
        block_ids = blocks[slots // block_size].long()
        elements = self.elements[slots % block_size, :width]
        heads = torch.arange(cache.shape[1], device=cache.device)
        row, column = (part[:, None] for part in (elements // cache.shape[3], elements % cache.shape[3]))
        return block_ids[:, None, None], heads[None, :, None], row, column


def slots_that_stay(plan: Plan, survivors: Survivors, stage: int, cached: Cached) -> npt.NDArray[np.int64]:
    """Of the slots that a prompt filled in ``stage``, those that stay in the cache, int64 [n], ascending."""
    ran = plan.places[stage].prompt_places(plan.num_prompt_tokens, survivors[stage])
    if cached is Cached.KEPT:
        return np.arange(len(ran))
    none = [np.zeros(0, dtype=np.int32)] * len(plan.spans)
    stay = survivors[-1] if cached is Cached.FINAL else none
    return np.flatnonzero(np.isin(ran, plan.places[stage].prompt_places(plan.num_prompt_tokens, stay)))
