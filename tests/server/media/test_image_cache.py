"""An image is no trouble when it comes again, whatever became of the requests that brought it before."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server.conftest import serving
from tests.server.harness import IMAGE_TOKENS, Server, content, image_url, kept

pytestmark = pytest.mark.server

FRESH = count(9000)
"""Seeds of images that no other test sends."""
SMALL_CACHE_GB = "0.012"
"""Room for a few processed images."""
NUM_IMAGES = 12
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


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    with serving(["--mm-processor-cache-gb", SMALL_CACHE_GB, "--enforce-eager"]) as started:
        yield started


def fresh() -> str:
    return image_url(next(FRESH))


def too_long(server: Server) -> str:
    """With an image; without one it would just fit."""
    limit: int = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    return "red " * (limit - IMAGE_TOKENS + 1)


def refused(server: Server, images: Sequence[str], **more: Any) -> None:
    response = server.http.post("/v1/chat/completions", json=server.body(images, **more))
    assert response.status_code == 400, response.text


@pytest.mark.parametrize("kind", REFUSED)
def test_after_a_refusal_the_image_is_answered(server: Server, kind: str) -> None:
    image = fresh()
    refused(server, [image], **REFUSED[kind])
    server.chat([image])


def test_after_a_prompt_that_is_too_long_by_its_image_the_image_is_answered(server: Server) -> None:
    image = fresh()
    refused(server, [image], text=too_long(server))
    server.chat([image])


def test_old_and_new_images_of_a_refused_request_are_answered(server: Server) -> None:
    old, new = fresh(), fresh()
    alone = server.chat([old])
    refused(server, [old, new, new], **REFUSED["an option's value"])
    refused(server, [new, old], **REFUSED["a bias of no token"])
    both = server.chat([old, new])
    assert kept(both["hidrop"]) == [2 * n for n in server.schedule.kept(IMAGE_TOKENS)]
    assert content(server.chat([old])) == content(alone)
    server.chat([new, new])


def test_an_image_is_processed_once(server: Server) -> None:
    image = fresh()
    refused(server, [image], **REFUSED["beam search"])
    hits = server.metric("vllm:mm_cache_hits_total")
    server.chat([image])
    server.chat([image])
    assert server.metric("vllm:mm_cache_hits_total") == hits + 2


def test_of_requests_at_once_with_one_new_image_those_that_are_good_are_answered(server: Server) -> None:
    bad = server.body([], **REFUSED["more tokens at least than at most"])

    def status(body: dict[str, Any]) -> int:
        return server.http.post("/v1/chat/completions", json=body).status_code

    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            good = server.body([fresh()], max_tokens=2)
            bodies = [bad | {"messages": good["messages"]}, good] * 4
            assert list(pool.map(status, bodies)) == [400, 200] * 4


def test_after_clients_that_hang_up_early_the_image_is_answered(server: Server) -> None:
    image = fresh()
    with httpx.Client(base_url=server.url) as impatient:
        for milliseconds in (2, 4, 8, 16, 32, 64):
            try:
                impatient.post("/v1/chat/completions", json=server.body([image]), timeout=milliseconds / 1000)
            except httpx.TimeoutException:
                continue
    server.chat([image])


def test_requests_at_once_that_evict_each_others_images_are_answered(small: Server) -> None:
    """Some are refused once their images have been processed, some wait for the trial of their grammar meanwhile."""
    images, rng = [fresh() for _ in range(NUM_IMAGES)], np.random.default_rng(0)

    def answer(number: int) -> tuple[int, httpx.Response]:
        chosen = [images[place] for place in np.random.default_rng(number).integers(0, NUM_IMAGES, 1 + number % 3)]
        kinds = {
            1: REFUSED["more tokens at least than at most"],
            2: {"structured_outputs": {"grammar": f'root ::= "red" # {number}'}},
        }
        body = small.body(chosen, max_tokens=2) | kinds.get(number % 4, {})
        return 400 if number % 4 == 1 else 200, small.http.post("/v1/chat/completions", json=body)

    with ThreadPoolExecutor(8) as pool:
        for expected, response in pool.map(answer, rng.permutation(160).tolist()):
            assert response.status_code == expected, response.text
