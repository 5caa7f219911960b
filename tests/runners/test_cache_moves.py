"""Closing up real caches: the same bytes as if the rows that stay had been written first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from platform import machine
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.engine.harness import engine
from vllm_hidrop.runners.cache_moves import SlotLayout
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

NUM_BLOCKS = 9
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, blocks of 64": {"dtype": "bfloat16", "block_size": 64},
    "fp8": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},  # e4m3
    "fp8_e5m2": {"dtype": "bfloat16", "kv_cache_dtype": "fp8_e5m2"},
}


@dataclass
class Cache:
    """A few pages of one attention module's cache, all of their slots written at random."""

    attention: Any
    pages: torch.Tensor
    layout: SlotLayout

    @classmethod
    def of(cls, attention: Any) -> "Cache":
        cache = cls(attention, torch.zeros_like(attention.kv_cache[:NUM_BLOCKS]), SlotLayout.of(attention))
        cache.write(cache.pages, np.arange(NUM_BLOCKS * cache.block_size), *cache.random_rows())
        return cache

    @property
    def block_size(self) -> int:
        return int(self.pages.shape[2])

    def random_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V for every slot, [T, G, D] each."""
        shape = 2, NUM_BLOCKS * self.block_size, self.pages.shape[1], self.attention.head_size
        key, value = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(
            self.pages.device, self.attention.dtype
        )
        return key, value

    def write(self, pages: torch.Tensor, slots: npt.NDArray[np.int64], key: torch.Tensor, value: torch.Tensor) -> None:
        self.attention.impl.do_kv_cache_update(
            self.attention, key, value, pages, torch.from_numpy(slots).to(pages.device)
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), "mistral")


@pytest.fixture(scope="module", params=list(SETTINGS))
def attention(request: pytest.FixtureRequest, model: Path) -> Iterator[Any]:
    with engine(model, None, **SETTINGS[request.param]) as running:
        yield running.runner.compilation_config.static_forward_context["language_model.model.layers.1.self_attn.attn"]


@pytest.fixture(params=["as chosen", "vec", "amx"])
def cache(attention: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A cache in the kernel's layout for this machine, and in others': writing them needs no special CPU."""
    if request.param != "as chosen":
        if machine() != "x86_64" or not hasattr(attention, "isa"):
            pytest.skip("layouts of vLLM's kernels for x86 CPUs")
        monkeypatch.setattr(attention, "isa", request.param)
    return Cache.of(attention)


def sources(num_slots: int) -> list[npt.NDArray[np.int64]]:
    """Ascending choices of slots: none, all, the first, the last, all but one, and at random."""
    rng = np.random.default_rng(3)
    everything = np.arange(num_slots)
    some = [everything[rng.random(num_slots) < share] for share in (0.05, 0.3, 0.5, 0.7, 0.95)]
    return [everything[:0], everything, everything[:5], everything[-5:], everything[1:], *some]


def test_the_layout_names_every_element_once(cache: Cache) -> None:
    width = 2 * cache.attention.head_size
    elements = cache.layout.elements
    assert elements.shape == (cache.block_size, width)
    assert torch.equal(elements.flatten().sort().values, torch.arange(cache.block_size * width, device=elements.device))


def test_closing_up_equals_writing_the_rows_that_stay_to_the_first_slots(cache: Cache) -> None:
    size = cache.block_size
    blocks = np.array([6, 2, 7, 4], dtype=np.int32)
    table = np.concatenate((blocks, np.zeros(3, dtype=np.int32)))  # as the runner's, longer than the request
    places = np.arange(3 * size + size // 3)
    slots = blocks[places // size].astype(np.int64) * size + places % size
    key, value = cache.random_rows()
    before = cache.pages.clone()
    for source in sources(len(places)):
        expected = before.clone()
        left = slots[source]
        cache.write(expected, slots[: len(left)], key[left], value[left])
        pages = before.clone()
        cache.layout.close_up(pages, torch.from_numpy(table), torch.from_numpy(source))
        assert torch.equal(pages.view(torch.uint8), expected.view(torch.uint8))
        others = [block for block in range(NUM_BLOCKS) if block not in blocks]
        assert torch.equal(pages[others], before[others])
        if len(source) in (0, len(places)):
            assert torch.equal(pages, before)


def test_learning_the_layout_leaves_the_cache_alone(cache: Cache) -> None:
    held = cache.attention.kv_cache[:NUM_BLOCKS].clone()
    SlotLayout.of(cache.attention)
    assert torch.equal(cache.attention.kv_cache[:NUM_BLOCKS], held)


def contiguous(pages: torch.Tensor) -> torch.Tensor:
    return pages.clone()


def heads_behind_slots(pages: torch.Tensor) -> torch.Tensor:
    """The layout that vLLM calls NHD: a page holds slot by slot, heads within."""
    return pages.transpose(1, 2).contiguous().transpose(1, 2)


def blocks_innermost_but_one(pages: torch.Tensor) -> torch.Tensor:
    return pages.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


def layers_side_by_side(pages: torch.Tensor) -> torch.Tensor:
    """One layer's slice of a tensor that holds several: no block follows the one before it."""
    several = torch.zeros(len(pages), 3, *pages.shape[1:], dtype=pages.dtype, device=pages.device)
    several[:, 1] = pages
    return several[:, 1]


def wider_rows(pages: torch.Tensor) -> torch.Tensor:
    """Rows padded to an alignment."""
    padded = torch.zeros(*pages.shape[:-1], pages.shape[-1] + 16, dtype=pages.dtype, device=pages.device)
    padded[..., : pages.shape[-1]] = pages
    return padded[..., : pages.shape[-1]]


STRIDES = [contiguous, heads_behind_slots, blocks_innermost_but_one, layers_side_by_side, wider_rows]


@pytest.mark.parametrize("strided", STRIDES, ids=lambda each: each.__name__)
def test_a_cache_of_any_strides_is_closed_up_and_read_alike(cache: Cache, strided: Callable[..., torch.Tensor]) -> None:
    """vLLM's CUDA backends give the same four dimensions by other strides."""
    table = np.array([6, 2, 7, 4, 0], dtype=np.int32)
    num_slots = 3 * cache.block_size + 5
    for source in sources(num_slots):
        expected, pages = cache.pages.clone(), strided(cache.pages)
        cache.layout.close_up(expected, torch.from_numpy(table), torch.from_numpy(source))
        cache.layout.close_up(pages, torch.from_numpy(table), torch.from_numpy(source))
        assert torch.equal(pages.contiguous().view(torch.uint8), expected.view(torch.uint8))
        keys = [cache.layout.read_keys(each, torch.from_numpy(table), num_slots) for each in (expected, pages)]
        assert keys[0].shape == (num_slots, expected.shape[1] * expected.shape[3] // 2)
        assert torch.equal(*(each.view(torch.uint8) for each in keys))
        for each in (expected, pages):
            cache.layout.change_keys(each, torch.from_numpy(table), num_slots, lambda keys: keys.flip(0))
        assert torch.equal(pages.contiguous().view(torch.uint8), expected.view(torch.uint8))


def test_a_layout_is_learnt_from_a_cache_of_any_strides() -> None:
    """With a kernel that writes by index, as CUDA's do: the layout is the identity whatever the strides."""
    pages = torch.zeros(3, 2, 32, 16)
    for strided in STRIDES:
        layout = SlotLayout.of(
            SimpleNamespace(kv_cache=strided(pages), head_size=8, dtype=pages.dtype, impl=Indexing())
        )
        assert torch.equal(layout.elements.flatten(), torch.arange(32 * 16))


class Indexing:
    """Writes K and V side by side in a slot's row."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        block, slot = slots // cache.shape[2], slots % cache.shape[2]
        cache[block, :, slot] = torch.cat((key, value), dim=-1)
