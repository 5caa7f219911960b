"""An image that came with a request which never reached the engine is no trouble when it comes again."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

from hidrop_server.known_images import KnownImages, know_images
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
    return MultiModalKwargsItem({name: MultiModalFieldElem(torch.zeros(3), MultiModalBatchedField())})


class Both:
    """This process's list and the engine's cache, with room for all."""

    def __init__(self, known: bool = True) -> None:
        config: Any = SimpleNamespace(get_multimodal_config=lambda: SimpleNamespace(mm_processor_cache_gb=1))
        renderer: Any = SimpleNamespace(_mm_processor_cache=None)
        renderer._mm_processor_cache = renderer.mm_processor_cache = LruKeyReplicatedSenderCache(config)
        if known:
            know_images(renderer)
        self.ours: LruKeyReplicatedSenderCache = renderer._mm_processor_cache
        self.engines = LruKeyReplicatedReceiverCache(config)

    def process(self, names: list[str]) -> list[tuple[str, MultiModalKwargsItem | None]]:
        """As vLLM does: ask which must be read, then list all."""
        read: list[MultiModalProcessorCacheInItem] = [
            None if known else (pixels(name), []) for name, known in zip(names, self.ours.is_cached(names), strict=True)
        ]
        return [(name, self.ours.get_and_update_item(item, name)[0]) for name, item in zip(names, read, strict=True)]

    def send(self, request: list[tuple[str, MultiModalKwargsItem | None]]) -> None:
        """The engine raises where it misses an image."""
        for name, item in request:
            assert name in self.engines.get_and_update_item(item, name)
        if isinstance(self.ours, KnownImages):
            self.ours.sent(name for name, _ in request)


IMAGES = st.lists(st.sampled_from("abc"), min_size=1, max_size=3)


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


def test_a_sent_image_is_sent_once() -> None:
    both = Both()
    first = both.process(["a", "a"])
    assert [item is not None for _, item in first] == [True, True], "the engine has neither"
    both.send(first)
    assert both.process(["a", "b"])[0] == ("a", None)
    both.ours.invalidate("a")
    assert both.process(["a"])[0][1] is not None, "vLLM's own way to forget one"


def test_vllms_list_still_needs_ours() -> None:
    """When this fails, vLLM forgets refused images itself: delete known_images.py."""
    stock = Both(known=False)
    stock.process(["a"])
    assert stock.process(["a"]) == [("a", None)]
