"""Reuse of a prefix that ends with an image, where an earlier prompt began with the same text and images.

::

    prompt            t t t t t v v v v v v t t t      t text, v vision
    before the first  |---------- reused -|     |      its K and V depend on what precedes them only
    cut               0                   h     end
    from the first    |- reused |-- carried ----|      what stays depends on the whole prompt, so every row runs again,
    cut on            0         c               end    those before h from the hidden states that enter the first cut

h is the end of an image, c the last block boundary within the text before the first image. The blocks are the pool's,
evicted as any cached block; the carried hidden states are the worker's, which keeps and drops them by the scheduler's
orders.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from typing import Any

import numpy as np
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id

from vllm_hidrop.engine.kv_cache import stage_managers
from vllm_hidrop.plan.plan import Plan


@dataclass(frozen=True)
class Reuse:
    """What a request that starts behind an image carries into its first cut: ``num_rows`` rows of state ``state``."""

    state: int
    num_rows: int


@dataclass
class Orders:
    """A step's orders to the worker about carried hidden states; a state is named by a number.

    Attributes:
        reuse: by request id, for requests that start behind an image and whose plan cuts.
        keep: request id -> number of the state to keep of its prompt.
        drop: states that are not needed after this step's reuse.
    """

    reuse: dict[str, Reuse] = field(default_factory=dict)
    keep: dict[str, int] = field(default_factory=dict)
    drop: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A reusable prefix that ends with an image.

    Attributes:
        num_tokens: its length, h.
        blocks: per KV group, its blocks, each with the hash it has as long as it holds this prefix.
        state: number of the worker's state; None where no stage cuts.
    """

    num_tokens: int
    blocks: tuple[tuple[tuple[KVCacheBlock, Any], ...], ...]
    state: int | None


@dataclass
class _State:
    num_bytes: int
    keys: set[bytes] = field(default_factory=set)  # of the entries that need the state


class ImagePrefixes:
    """The scheduler's book of reusable prefixes.

    A row of the state that enters stage s has ``row_bytes[s]``, all kept states at most ``capacity_bytes`` together; 0
    keeps none.
    """

    def __init__(self, managers: Sequence[Any], block_pool: Any, row_bytes: Sequence[int], capacity_bytes: int) -> None:
        self.managers = stage_managers(managers)
        self.block_pool = block_pool
        self.row_bytes = row_bytes
        self.capacity_bytes = capacity_bytes
        self.entries: OrderedDict[bytes, Entry] = OrderedDict()
        self.states: OrderedDict[int, _State] = OrderedDict()
        self.storing: dict[str, int] = {}
        """Request id -> state that the worker keeps of its prompt, until its prefixes are entered here."""
        self.hits: dict[str, Entry] = {}
        self.keys: dict[str, list[tuple[bytes, int]]] = {}
        self.orders = Orders()
        self.numbers = count(1)

    @property
    def num_bytes(self) -> int:
        """Size of all states."""
        return sum(state.num_bytes for state in self.states.values())

    def find(self, request: Any, plan: Plan) -> Entry | None:
        """The longest prefix of a request whose blocks, and state, are still there."""
        for key, _ in reversed(self._keys(request, plan)):
            entry = self.entries.get(key)
            if entry is None:
                continue
            if self._is_intact(entry):
                self.entries.move_to_end(key)
                if entry.state is not None:
                    self.states.move_to_end(entry.state)
                self.hits[request.request_id] = entry
                return entry
            self._forget(key)
        return None

    def _keys(self, request: Any, plan: Plan) -> list[tuple[bytes, int]]:
        if request.request_id not in self.keys:
            self.keys[request.request_id] = list(prefix_keys(request, plan))
        return self.keys[request.request_id]

    def _is_intact(self, entry: Entry) -> bool:
        """Whether every block still holds the prefix, and was written before this step."""
        return all(
            block.block_hash == block_hash and block.block_id not in manager.fresh
            for manager, blocks in zip(self.managers, entry.blocks, strict=True)
            for block, block_hash in blocks
        )

    def blocks_of(self, entry: Entry) -> KVCacheBlocks:
        """The entry's blocks as vLLM's type for those of a prefix-cache hit."""
        return KVCacheBlocks(tuple([block for block, _ in blocks] for blocks in entry.blocks))

    def start(self, prompts: Iterable[tuple[Any, Plan, int]]) -> None:
        """Give orders for the prompts, (request, plan, first token that runs), whose ends run in this step."""
        cutting = [(request, plan, first) for request, plan, first in prompts if plan.first_cut < len(plan.kept)]
        for request, plan, first in cutting:
            if first > plan.prefix_tokens:
                entry = self.hits[request.request_id]
                assert entry.num_tokens == first
                assert entry.state is not None
                self.orders.reuse[request.request_id] = Reuse(entry.state, plan.num_carried(first))
        for request, plan, first in cutting:
            has_rows = first <= plan.carried_from or first > plan.prefix_tokens
            if has_rows and any(key not in self.entries for key, _ in self._keys(request, plan)):
                row_bytes = self.row_bytes[plan.first_cut]
                self._keep(request.request_id, plan.num_carried(plan.spans[-1].end) * row_bytes)

    def _keep(self, request_id: str, num_bytes: int) -> None:
        if num_bytes > self.capacity_bytes:
            return
        while self.num_bytes + num_bytes > self.capacity_bytes:
            self._drop(next(iter(self.states)))
        state = next(self.numbers)
        self.states[state] = _State(num_bytes)
        self.storing[request_id] = self.orders.keep[request_id] = state

    def ran(self, request: Any, plan: Plan) -> None:
        """Enter the prefixes that end with the images of a prompt that has run."""
        state = self.storing.pop(request.request_id, None)
        if state is None and plan.first_cut < len(plan.kept):
            return
        if request.num_computed_tokens >= plan.num_prompt_tokens:  # else preempted since
            for key, num_tokens in self._keys(request, plan):
                if key not in self.entries or not self._is_intact(self.entries[key]):
                    self._forget(key)
                    self._enter(key, Entry(num_tokens, self._hashed(request.request_id, plan, num_tokens), state))
        if state is not None and not self.states[state].keys:
            self._drop(state)
        while len(self.entries) > len(self.block_pool.blocks):
            self._forget(next(iter(self.entries)))

    def _enter(self, key: bytes, entry: Entry) -> None:
        self.entries[key] = entry
        if entry.state is not None:
            self.states[entry.state].keys.add(key)

    def _hashed(self, request_id: str, plan: Plan, num_tokens: int) -> tuple[tuple[tuple[KVCacheBlock, Any], ...], ...]:
        """The blocks of a request's first tokens, with their hashes; a block without one gets one, which caches it."""
        hashed = []
        for manager in self.managers:
            num_slots = plan.stage_tokens(manager.kv_cache_spec.stage, num_tokens)
            blocks = manager.req_to_blocks[request_id][: cdiv(num_slots, manager.block_size)]
            for block in blocks:
                if block.block_hash is None:
                    unique = BlockHash(next(self.numbers).to_bytes(24, "big"))
                    block_hash = make_block_hash_with_group_id(unique, manager.kv_cache_group_id)
                    self.block_pool._insert_block_hash(block_hash, block, num_tokens=manager.block_size)
            hashed.append(tuple((block, block.block_hash) for block in blocks))
        return tuple(hashed)

    def _forget(self, key: bytes) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None and entry.state is not None:
            keys = self.states[entry.state].keys
            keys.discard(key)
            if not keys:
                self._drop(entry.state)

    def _drop(self, state: int) -> None:
        for key in self.states.pop(state).keys:
            del self.entries[key]
        for request_id in [request_id for request_id, number in self.storing.items() if number == state]:
            del self.storing[request_id]
            if self.orders.keep.pop(request_id, None) is not None:
                return  # the order to keep the state has not been sent
        self.orders.drop.append(state)

    def gone(self, request_id: str) -> None:
        """Forget a request that is freed or preempted, and the state that was to be kept of its prompt."""
        self.hits.pop(request_id, None)
        self.keys.pop(request_id, None)
        if request_id in self.storing:
            self._drop(self.storing[request_id])

    def clear(self) -> None:
        """Forget all prefixes."""
        self.entries = OrderedDict((key, entry) for key, entry in self.entries.items() if entry.state is not None)
        for state in list(self.states):
            self._drop(state)

    def take_orders(self) -> Orders:
        """The orders since the last step."""
        orders, self.orders = self.orders, Orders()
        return orders


def prefix_keys(request: Any, plan: Plan) -> Iterator[tuple[bytes, int]]:
    """Keys and lengths of a request's prefixes that end with an image.

    A key covers all that the KV before the first cut depends on: tokens, images, the request's salt, and how many
    tokens of the images every stage before the cut keeps; renumbered, also how many it drops of all images.
    """
    dropped = plan.dropped[: plan.first_cut] if plan.renumbered else ()
    digest = sha256(repr((plan.first_cut, request.cache_salt, dropped)).encode())
    tokens = np.asarray(request.prompt_token_ids, dtype=np.int64)
    features = sorted(request.mm_features, key=lambda feature: feature.mm_position.offset)
    start = 0
    for item, feature in enumerate(features):
        indices = [index for index, span in enumerate(plan.spans) if span.item == item]
        spans, end = [plan.spans[index] for index in indices], plan.spans[indices[-1]].end
        digest.update(tokens[start:end].tobytes())
        kept = tuple(tuple(stage[index] for index in indices) for stage in plan.kept[: plan.first_cut])
        places = tuple((span.offset, span.length) for span in spans)
        digest.update(repr((feature.identifier, places, kept)).encode())
        start = end
        yield digest.digest(), end
