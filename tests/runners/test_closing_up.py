"""Which slots of a cache stay once a prompt has run, and their move on made-up cache layouts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.schedule import Cached
from vllm_hidrop.runners.cache_moves import SlotLayout, slots_that_stay
from vllm_hidrop.staged.step import IntArray, Survivors

settings.load_profile("ci")  # no deadline on a shared machine, the same examples every time


@st.composite
def finished(draw: st.DrawFn) -> tuple[Plan, Survivors]:
    """A prompt and what three stages ran with."""
    spans, offset = [], draw(st.integers(0, 3))
    for length in draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)):
        spans.append(Span(offset, length))
        offset += length + draw(st.integers(0, 2))
    stages: list[tuple[IntArray, ...]] = []
    left = [list(range(span.length)) for span in spans]
    for _ in range(3):
        left = [sorted(draw(st.sets(st.sampled_from(tokens)))) if tokens else [] for tokens in left]
        stages.append(tuple(np.array(tokens, dtype=np.int32) for tokens in left))
    kept = tuple(tuple(len(tokens) for tokens in stage) for stage in stages)
    return Plan(offset + draw(st.integers(1, 4)), tuple(spans), kept, adaptive=True), tuple(stages)


@given(finished(), st.integers(0, 2), st.sampled_from([Cached.FINAL, Cached.NONE]))
def test_slots_that_stay_are_those_of_text_and_of_the_tokens_cached(
    prompt: tuple[Plan, Survivors], stage: int, cached: Cached
) -> None:
    plan, survivors = prompt

    def rows(held: tuple[IntArray, ...] | None) -> list[int]:
        """Places in the prompt of text, and of the tokens held of every image."""
        left = set(range(plan.num_prompt_tokens)) - {p for span in plan.spans for p in range(span.offset, span.end)}
        for span, tokens in zip(plan.spans, held or (), strict=held is not None):
            left |= {span.offset + int(token) for token in tokens}
        return sorted(left)

    ran = rows(survivors[stage])
    found = slots_that_stay(plan, survivors, stage, cached)
    assert found.dtype == np.int64
    assert [ran[slot] for slot in found] == rows(survivors[-1] if cached is Cached.FINAL else None)


@dataclass
class MadeUpCache:
    """An attention module whose pages hold a slot's elements in any order; ``write`` may blur what is written."""

    order: torch.Tensor
    """int64 [slots, 2 * D]."""
    num_heads: int = 2
    dtype: torch.dtype = torch.float32
    write: Callable[[torch.Tensor], torch.Tensor] = torch.clone

    def __post_init__(self) -> None:
        num_slots, width = self.order.shape
        self.head_size = width // 2
        self.kv_cache = torch.zeros(5, self.num_heads, num_slots, width)
        self.impl: Any = self

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        assert layer is self
        blocks, places = slots // len(self.order), self.order[slots % len(self.order)]
        pages = cache.view(len(cache), self.num_heads, -1)
        heads = torch.arange(self.num_heads)[None, :, None]
        pages[blocks[:, None, None], heads, places[:, None]] = self.write(torch.cat((key, value), dim=-1))


def shuffled(num_slots: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_slots * width)
    return torch.randperm(num_slots * width, generator=generator).view(num_slots, width)


# Fewer elements than one digit tells apart, exactly as many as one and two do, and some that need four.
SIZES = [(2, 2), (4, 4), (3, 14), (32, 8), (32, 130)]


@pytest.mark.parametrize(("num_slots", "width"), SIZES)
def test_any_order_of_a_pages_elements_is_found(num_slots: int, width: int) -> None:
    order = shuffled(num_slots, width)
    cache = MadeUpCache(order)
    assert torch.equal(SlotLayout.of(cache).elements, order)
    assert not cache.kv_cache.any(), "the real pages were written"


@settings(max_examples=50)
@given(source=st.sets(st.integers(0, 15)).map(sorted), blocks=st.permutations(range(5)))
def test_closing_up_equals_writing_to_the_first_slots(source: list[int], blocks: list[int]) -> None:
    cache = MadeUpCache(shuffled(4, 6))
    rows = torch.arange(16 * 2 * 6, dtype=torch.float32).view(16, 2, 6) + 1
    table = np.array(blocks, dtype=np.int32)
    slots = torch.from_numpy(table[np.arange(16) // 4].astype(np.int64)) * 4 + torch.arange(16) % 4
    cache.kv_cache.fill_(-1)
    cache.do_kv_cache_update(cache, rows[..., :3], rows[..., 3:], cache.kv_cache, slots)
    expected = cache.kv_cache.clone()
    left = rows[source]
    cache.do_kv_cache_update(cache, left[..., :3], left[..., 3:], expected, slots[: len(left)])
    SlotLayout.of(cache).close_up(cache.kv_cache, torch.from_numpy(table), torch.tensor(source, dtype=torch.int64))
    assert torch.equal(cache.kv_cache, expected)


def blurred(written: torch.Tensor) -> torch.Tensor:
    return written.clamp(max=5)


@pytest.mark.parametrize(
    "cache",
    [MadeUpCache(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 6]])), MadeUpCache(shuffled(4, 4), write=blurred)],
    ids=["two elements in one place", "digits that cannot be told apart"],
)
def test_a_page_that_loses_an_element_is_refused(cache: MadeUpCache) -> None:
    with pytest.raises(ValueError, match="cannot be closed up"):
        SlotLayout.of(cache)
