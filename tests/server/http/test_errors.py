"""What a client may not send: a 4xx with one clear line, and a server that goes on."""

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.server.harness import (
    IMAGE_TOKENS,
    Server,
    content,
    damaged,
    data_url,
    image_url,
    picture,
    png_that_claims,
)

pytestmark = pytest.mark.server

Xargs = dict[str, Any]


class Mistake(NamedTuple):
    """A request that must be refused, and a part of the message that says why."""

    says: str
    images: list[str]
    more: dict[str, Any]


def wish(says: str, xargs: Xargs, **more: Any) -> Mistake:
    return Mistake(says, [image_url()], {"vllm_xargs": xargs, **more})


def image(says: str, *urls: str) -> Mistake:
    return Mistake(says, list(urls), {})


MISTAKES: dict[str, Mistake] = {
    "unknown option": wish("known: hidrop, hidrop_keep", {"hidrop_kep": [1]}),
    "unknown option in a stream": wish("known: hidrop, hidrop_keep", {"hidropp": "on"}, stream=True),
    "a key that is not ours and nobody reads": wish("known: hidrop, hidrop_keep", {"explain": True}),
    "such a key without an image": Mistake("known: hidrop, hidrop_keep", [], {"vllm_xargs": {"keep": 5}}),
    "an explanation of another kind": wish("must be true or false", {"hidrop_explain": "yes"}),
    "a number for an explanation": wish("must be true or false", {"hidrop_explain": 2}),
    "a method that is a number": wish("cannot run 3", {"hidrop_method": 3}),
    "a method that is a list": wish("cannot run", {"hidrop_method": ["fastv"]}),
    "neither on nor off": wish('must be "on" or "off"', {"hidrop": "maybe"}),
    "a number for on": wish('must be "on" or "off"', {"hidrop": 1}),
    "keeps that are no list": wish("must be a list", {"hidrop_keep": "all"}),
    "wrong number of keeps": wish("stages, got 1 keeps", {"hidrop_keep": ["all"]}),
    "keeps with off": wish("do not send", {"hidrop": "off", "hidrop_keep": ["all"]}),
    "prompt log-probabilities": Mistake("prompt_logprobs", [image_url()], {"prompt_logprobs": 1}),
    "beam search": Mistake("beam search", [image_url()], {"use_beam_search": True, "n": 2}),
    "not an image": image("not an image", data_url(b"these bytes are no image")),
    "half an image": image("truncated", data_url(picture()[:200])),
    "not base64": image("base64", "data:image/png;base64,@@@"),
    "a data URL without base64": image("base64", "data:image/png,abc"),
    "a header of 400 megapixels": image("VLLM_MAX_IMAGE_PIXELS", data_url(png_that_claims(20_000, 20_000))),
    "a header of 60 megapixels": image("VLLM_MAX_IMAGE_PIXELS", data_url(png_that_claims(10_000, 6_000))),
    "a file of the server": image("--allowed-local-media-path", "file:///etc/passwd"),
    "a remote image": image("--allowed-media-domains", "http://127.0.0.1:9/image.png"),
    "another scheme": image("URL", "ftp://127.0.0.1/image.png"),
    "too many images": image("At most 4 image", *[image_url()] * 5),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_400_that_says_what_to_do(server: Server, name: str) -> None:
    mistake = MISTAKES[name]
    response = server.http.post("/v1/chat/completions", json=server.body(mistake.images, **mistake.more))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert mistake.says in error["message"]
    assert "\n" not in error["message"]
    assert error["code"] == 400
    assert error["type"] == "BadRequestError"


BROKEN_KEEPS: dict[str, Callable[[int], list[Any]]] = {
    "rising": lambda n: [10, 20, *[0] * (n - 2)],
    "all after a count": lambda n: [10, "all", *[0] * (n - 2)],
    "a fraction above one": lambda n: ["all", 1.5, *[0] * (n - 2)],
    "negative": lambda n: ["all", -1, *[0] * (n - 2)],
    "a word": lambda n: ["all", "some", *[0] * (n - 2)],
    "part of them injected": lambda n: [0, 10, *[0] * (n - 2)],
}


@pytest.mark.parametrize("name", BROKEN_KEEPS)
def test_keeps_that_break_an_invariant_are_a_400(server: Server, name: str) -> None:
    keeps = BROKEN_KEEPS[name](len(server.schedule.stages))
    body = server.body([image_url()], vllm_xargs={"hidrop_keep": keeps})
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert "keep" in response.json()["error"]["message"]


@pytest.mark.parametrize("keep", ["NaN", "Infinity", "1e999", "-1e999", "1" + "0" * 30, "-0.5"])
def test_a_keep_that_is_no_number_of_tokens_is_a_400(server: Server, keep: str) -> None:
    body = server.body([image_url()], vllm_xargs={"hidrop_keep": ["KEEP"] * len(server.schedule.stages)})
    text = json.dumps(body).replace('"KEEP"', keep)
    response = server.http.post("/v1/chat/completions", content=text, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text


@pytest.mark.parametrize("value", [None, {"method": "fastv"}, [["a"]]])
def test_an_option_of_a_type_that_vllm_refuses_is_a_400(server: Server, value: Any) -> None:
    body = server.body([image_url()], vllm_xargs={"hidrop": value})
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "vllm_xargs" in response.text


@pytest.mark.parametrize("images", [0, 1])
def test_a_prompt_that_is_too_long_is_a_400(server: Server, images: int) -> None:
    limit = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    words = limit + 1 - images * IMAGE_TOKENS
    body = server.body([image_url()] * images, "red " * words)
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert str(limit) in response.json()["error"]["message"]


def test_no_damaged_file_is_the_servers_fault(server: Server) -> None:
    rng = random.Random(0)
    formats = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "ICO", "SGI", "TGA", "JPEG2000", "ICNS", "DDS")
    statuses = set()
    for image_format in formats:
        file = picture(0, image_format)
        for _ in range(12):
            body = server.body([data_url(damaged(file, rng))], max_tokens=1)
            statuses.add(server.http.post("/v1/chat/completions", json=body).status_code)
    assert statuses == {200, 400}


def test_after_all_mistakes_requests_work_and_no_block_is_held(server: Server) -> None:
    before = content(server.chat([image_url()]))
    refused = server.metric("vllm_hidrop_refused_requests_total")
    for mistake in MISTAKES.values():
        server.http.post("/v1/chat/completions", json=server.body(mistake.images, **mistake.more))
    assert content(server.chat([image_url()])) == before
    assert server.metric("vllm_hidrop_refused_requests_total") > refused
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0
