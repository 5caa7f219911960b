"""An image that came with a request which never reached the engine is no trouble when it comes again."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.multimodal.cache.base import MultiModalProcessorCacheInItem
from vllm.multimodal.cache.lru import LruKeyReplicatedReceiverCache, LruKeyReplicatedSenderCache
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from hidrop_server import known_images
from hidrop_server.known_images import MOST_UNSENT, KnownImages, know_images
from tests.server.harness import IMAGE_TOKENS, Server, content, image_url, kept

FRESH = count(9000)
"""Seeds of images that no other test sends."""
REFUSED: dict[str, dict[str, Any]] = {
    "an unknown option": {"vllm_xargs": {"hidropp": "on"}},
    "an option's value": {"vllm_xargs": {"hidrop": "maybe"}},
    "an option too big for the wire": {"vllm_xargs": {"session_id": 10**30}},
    "a keep too big for the wire": {"vllm_xargs": {"hidrop_keep": [10**30]}},
    "beam search": {"use_beam_search": True, "n": 2},
    "prompt log-probabilities": {"prompt_logprobs": 1},
    "a stop token that is none": {"stop_token_ids": [10**30]},
    "a bias of no token": {"logit_bias": {"99999999": 1.0}},
    "a grammar that is none": {"structured_outputs": {"regex": "(("}},
    "more tokens at least than at most": {"min_tokens": 9, "max_tokens": 2, "n": 2},
    "too many log-probabilities": {"logprobs": True, "top_logprobs": 10**9},
}


def fresh() -> str:
    return image_url(next(FRESH))


def too_long(server: Server) -> str:
    """With an image; without one it would just fit."""
    limit: int = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    return "red " * (limit - IMAGE_TOKENS + 1)


def refused(server: Server, images: Sequence[str], **more: Any) -> None:
    response = server.http.post("/v1/chat/completions", json=server.body(images, **more))
    assert response.status_code == 400, response.text


@pytest.mark.server
class TestOnAServer:
    @pytest.mark.parametrize("kind", REFUSED)
    def test_after_a_refusal_the_image_is_answered(self, server: Server, kind: str) -> None:
        image = fresh()
        refused(server, [image], **REFUSED[kind])
        server.chat([image])

    def test_after_a_prompt_that_is_too_long_by_its_image_the_image_is_answered(self, server: Server) -> None:
        image = fresh()
        refused(server, [image], text=too_long(server))
        server.chat([image])

    def test_a_refusal_of_several_images_forgets_the_new_ones_alone(self, server: Server) -> None:
        old, new = fresh(), fresh()
        alone = server.chat([old])
        refused(server, [old, new, new], **REFUSED["an option's value"])
        refused(server, [new, old], **REFUSED["a bias of no token"])
        both = server.chat([old, new])
        assert kept(both["hidrop"]) == [2 * n for n in server.schedule.kept(IMAGE_TOKENS)]
        assert content(server.chat([old])) == content(alone)
        server.chat([new, new])

    def test_an_image_that_was_answered_is_sent_without_its_pixels(self, server: Server) -> None:
        image = fresh()
        refused(server, [image], **REFUSED["beam search"])
        server.chat([image])
        hits = server.metric("vllm:mm_cache_hits_total")
        server.chat([image])
        assert server.metric("vllm:mm_cache_hits_total") == hits + 1

    def test_of_requests_at_once_with_one_new_image_those_that_are_good_are_answered(self, server: Server) -> None:
        bad = server.body([], **REFUSED["more tokens at least than at most"])

        def status(body: dict[str, Any]) -> int:
            return server.http.post("/v1/chat/completions", json=body).status_code

        with ThreadPoolExecutor(8) as pool:
            for _ in range(4):
                good = server.body([fresh()], max_tokens=2)
                bodies = [bad | {"messages": good["messages"]}, good] * 4
                assert list(pool.map(status, bodies)) == [400, 200] * 4

    def test_after_clients_that_hang_up_early_the_image_is_answered(self, server: Server) -> None:
        image = fresh()
        with httpx.Client(base_url=server.url) as impatient:
            for milliseconds in (2, 4, 8, 16, 32, 64):
                try:
                    impatient.post("/v1/chat/completions", json=server.body([image]), timeout=milliseconds / 1000)
                except httpx.TimeoutException:
                    continue
        server.chat([image])


def pixels(name: str) -> MultiModalKwargsItem:
    return MultiModalKwargsItem({name: MultiModalFieldElem(torch.zeros(LENGTHS[name]), MultiModalBatchedField())})


Processed = list[MultiModalFeatureSpec]
LENGTHS = dict.fromkeys("abcdefgh", 1000) | {"i": 3000, "j": 30_000}
"""Float32 elements of every image."""
IMAGE_BYTES = 4000


class Both:
    """This process's list and the engine's cache, with room for so many bytes."""

    def __init__(self, num_bytes: float = 1 << 30, known: bool = True) -> None:
        size = num_bytes / (1 << 30)
        config: Any = SimpleNamespace(get_multimodal_config=lambda: SimpleNamespace(mm_processor_cache_gb=size))
        renderer: Any = SimpleNamespace(_mm_processor_cache=None)
        renderer._mm_processor_cache = renderer.mm_processor_cache = LruKeyReplicatedSenderCache(config)
        if known:
            know_images(renderer)
        self.ours: LruKeyReplicatedSenderCache = renderer._mm_processor_cache
        self.engines = LruKeyReplicatedReceiverCache(config)

    def process(self, names: Sequence[str]) -> Processed:
        """As vLLM does: ask which must be read, touch all, then list all."""
        read: list[MultiModalProcessorCacheInItem] = [
            None if known else (pixels(name), [])
            for name, known in zip(names, self.ours.is_cached(list(names)), strict=True)
        ]
        for name in names:
            self.ours.touch_sender_cache_item(name)
        found = [self.ours.get_and_update_item(item, name)[0] for name, item in zip(names, read, strict=True)]
        self.ours.release_sender_touches()
        place = PlaceholderRange(0, 1)
        return [
            MultiModalFeatureSpec(item, "image", name, place, name) for name, item in zip(names, found, strict=True)
        ]

    def send(self, request: Processed) -> None:
        """The engine raises where it misses an image."""
        if isinstance(self.ours, KnownImages):
            self.ours.sent(request)
        received = [replace(feature) for feature in request]
        for feature in self.engines.get_and_update_features(received):
            assert feature.identifier in (feature.data or {})


@pytest.fixture(autouse=True)
def small_caches_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the property tests hold a few images, and few are sent while one waits."""
    monkeypatch.setattr(known_images, "ROOM_IMAGES", 0)


def test_a_cache_with_no_room_for_what_others_send_is_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_images, "ROOM_IMAGES", 64)
    for num_images, is_known in ((127, False), (128, True)):
        both = Both(num_images * IMAGE_BYTES)
        both.send(both.process(["a"]))
        assert both.ours.is_cached(["a"]) == [is_known]


IMAGES = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3)


@given(st.lists(st.tuples(IMAGES, st.booleans(), st.integers(0, 3)), max_size=30))
@settings(deadline=None)
def test_the_engine_has_every_image_that_comes_without_pixels(steps: list[tuple[list[str], bool, int]]) -> None:
    """Requests are processed, wait a while beside others, and are sent or refused in any order."""
    both, waiting = Both(), []
    for names, is_sent, turn in steps:
        waiting.append((both.process(names), is_sent))
        if len(waiting) > 3:
            request, goes = waiting.pop(turn)
            if goes:
                both.send(request)
    for request, goes in waiting:
        if goes:
            both.send(request)


@given(
    st.lists(st.tuples(st.lists(st.sampled_from(list(LENGTHS)), min_size=1, max_size=4), st.booleans()), max_size=40),
    st.integers(1, 9),
)
@settings(deadline=None)
def test_a_cache_too_small_for_all_misses_nothing_that_is_sent_without_pixels(
    steps: list[tuple[list[str], bool]], num_images: int
) -> None:
    """Images of several sizes, one of them too large for most caches; refused requests change no order."""
    both = Both(num_images * IMAGE_BYTES)
    for names, is_sent in steps:
        request = both.process(names)
        if is_sent:
            both.send(request)


PAIR = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=2)


@given(st.lists(st.tuples(PAIR, PAIR, PAIR, st.permutations(range(3))), max_size=15))
@settings(deadline=None)
def test_requests_at_once_are_sent_in_any_order(steps: list[tuple[list[str], list[str], list[str], list[int]]]) -> None:
    """What the others bring while one waits fits in the half that is not counted on."""
    both = Both(12 * IMAGE_BYTES)
    for *requests, order in steps:
        waiting = [both.process(names) for names in requests]
        for turn in order:
            both.send(waiting[turn])


def test_a_refused_request_does_not_touch_the_order_of_eviction() -> None:
    """The engine never hears of it, and would evict what this process counts on."""
    both = Both(6 * IMAGE_BYTES)
    for name in "abc":
        both.send(both.process(name))
    both.process("a")  # refused
    for name in "defg":  # the engine evicts a
        both.send(both.process(name))
    both.send(both.process("a"))


def test_a_sent_image_is_sent_once() -> None:
    both = Both()
    first = both.process(["a", "a"])
    assert [feature.data is not None for feature in first] == [True, True], "the engine has neither"
    both.send(first)
    assert both.process(["a", "b"])[0].data is None
    both.ours.invalidate("a")
    assert both.process(["a"])[0].data is not None, "vLLM's own way to forget one"


def test_an_image_that_is_displaced_while_it_is_processed_is_still_laid_out() -> None:
    """Processing takes a thread, sending the event loop; what the list said at first holds to the end."""
    both = Both(2 * IMAGE_BYTES)
    both.send(both.process(["a"]))
    assert both.ours.is_cached(["a"]) == [True]
    both.send(
        [
            MultiModalFeatureSpec(
                both.ours.get_and_update_item((pixels("b"), []), "b")[0], "image", "b", PlaceholderRange(0, 1), "b"
            )
        ]
    )
    assert both.ours.get_and_update_item(None, "a") == (None, [])


def test_what_is_refused_is_forgotten() -> None:
    both = Both()
    assert isinstance(both.ours, KnownImages)
    for number in range(3 * MOST_UNSENT):
        LENGTHS[str(number)] = 1
        both.process([str(number)])
    assert len(both.ours._unsent) == MOST_UNSENT
    assert len(both.ours._cache) == 0


def test_vllms_list_still_needs_ours() -> None:
    """When this fails, vLLM forgets refused images itself: delete known_images.py."""
    stock = Both(known=False)
    stock.process(["a"])
    assert stock.process(["a"])[0].data is None
