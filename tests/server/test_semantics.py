"""What an OpenAI client may ask for means the same on a pruning server, for pruned, ``off`` and text requests."""

import re
import time
from typing import Any

import pytest
from openai import OpenAI

from tests.server.harness import QUESTION, Server, image_url

pytestmark = pytest.mark.server

KINDS: dict[str, dict[str, Any]] = {
    "pruned": {"images": [image_url(5)]},
    "off": {"images": [image_url(5)], "vllm_xargs": {"hidrop": "off"}},
    "text": {"images": []},
}
FORM = "(red|blue)(circle|square)"
"""Without a space: the embedded model's vocabulary has words alone, and none is a space."""
WORDS: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(KINDS[request.param])


def create(client: OpenAI, server: Server, kind: dict[str, Any], **more: Any) -> Any:
    """Ask with the OpenAI client; what is not OpenAI's goes to ``extra_body``."""
    body = server.body(kind["images"], QUESTION, **more)
    ours: dict[str, Any] = {
        key: body.pop(key) for key in ("ignore_eos", "structured_outputs", "min_tokens", "top_k") if key in body
    }
    if "vllm_xargs" in kind:
        ours["vllm_xargs"] = kind["vllm_xargs"]
    return client.chat.completions.create(**body, extra_body=ours)


def choices_of(answer: Any) -> list[tuple[str, str, Any]]:
    return [(choice.message.content, choice.finish_reason, choice.stop_reason) for choice in answer.choices]


def choices_of_stream(chunks: list[Any]) -> list[tuple[str, str, Any]]:
    parts = [choice for chunk in chunks for choice in chunk.choices]
    found = []
    for index in sorted({part.index for part in parts}):
        own = [part for part in parts if part.index == index]
        text = "".join(part.delta.content or "" for part in own)
        (last,) = [part for part in own if part.finish_reason]
        found.append((text, last.finish_reason, last.stop_reason))
    return found


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"n": 3, "temperature": 1.0, "top_k": 20, "seed": 5},
        {"stop": ["red", "is", "circle", "the"]},
        {"temperature": 0.8, "top_k": 0, "top_p": 0.9, "seed": 2, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"structured_outputs": {"regex": FORM}, "ignore_eos": False},
    ],
    ids=["greedy", "n", "stop", "sampled", "regex"],
)
def test_a_stream_adds_up_to_the_whole(server: Server, kind: dict[str, Any], asked: dict[str, Any]) -> None:
    asked = WORDS | asked
    whole = create(server.openai, server, kind, **asked)
    stream = create(server.openai, server, kind, stream=True, stream_options={"include_usage": True}, **asked)
    chunks = list(stream)
    assert choices_of_stream(chunks) == choices_of(whole)
    last = chunks[-1]
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert create(server.openai, server, kind, **asked).choices == whole.choices, "asked twice, answered twice alike"


def test_a_stop_string_cuts_what_would_have_come(server: Server, kind: dict[str, Any]) -> None:
    ((text, _, _),) = choices_of(create(server.openai, server, kind, **WORDS))
    word = text.split()[len(text.split()) // 2]
    ((cut, reason, stop),) = choices_of(create(server.openai, server, kind, **WORDS, stop=[word]))
    assert (cut, reason, stop) == (text[: text.index(word)], "stop", word)


def test_each_of_n_choices_is_what_its_seed_gives(server: Server, kind: dict[str, Any]) -> None:
    asked = WORDS | {"temperature": 1.5, "top_k": 20}
    together = choices_of(create(server.openai, server, kind, **asked, n=3, seed=40))
    alone = [choices_of(create(server.openai, server, kind, **asked, seed=40 + i))[0] for i in range(3)]
    assert together == alone
    assert len(set(together)) > 1


def test_tokens_end_when_they_are_told_to(server: Server, kind: dict[str, Any]) -> None:
    answer = create(server.openai, server, kind, max_tokens=9, ignore_eos=True)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (9, "length")
    answer = create(server.openai, server, kind, max_tokens=24)
    assert answer.choices[0].finish_reason == "stop"
    ended = answer.usage.completion_tokens
    answer = create(server.openai, server, kind, max_tokens=24, min_tokens=ended + 4)
    assert answer.usage.completion_tokens >= ended + 4


def test_logprobs_are_of_the_tokens_that_come(server: Server, kind: dict[str, Any]) -> None:
    answer = create(server.openai, server, kind, max_tokens=6, ignore_eos=True, logprobs=True, top_logprobs=3)
    steps = answer.choices[0].logprobs.content
    assert len(steps) == 6
    assert all(step.logprob == step.top_logprobs[0].logprob and len(step.top_logprobs) == 3 for step in steps)
    chunks = list(
        create(server.openai, server, kind, max_tokens=6, ignore_eos=True, logprobs=True, top_logprobs=3, stream=True)
    )
    streamed = [
        step for chunk in chunks for choice in chunk.choices if choice.logprobs for step in choice.logprobs.content
    ]
    assert [step.token for step in streamed] == [step.token for step in steps]
    assert [step.logprob for step in streamed] == pytest.approx([step.logprob for step in steps], abs=1e-4)


def test_a_grammar_is_followed(server: Server, kind: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"max_tokens": 24}
    chosen = create(server.openai, server, kind, structured_outputs={"choice": ["red", "blue", "green"]}, **asked)
    assert chosen.choices[0].message.content.strip() in ("red", "blue", "green")
    found = create(server.openai, server, kind, structured_outputs={"regex": FORM}, **asked)
    assert re.fullmatch(FORM, found.choices[0].message.content.replace(" ", ""))


def test_a_client_that_gives_up_frees_its_request(server: Server, kind: dict[str, Any]) -> None:
    """It leaves at the first line of a stream; on a machine that stalls that can come after the last: then again."""
    aborted = server.metric("vllm_hidrop_requests_total", mode="aborted")
    body = server.body(kind["images"], max_tokens=3000, ignore_eos=True, stream=True)
    body["vllm_xargs"] = kind.get("vllm_xargs", {})
    for _ in range(5):
        ended = server.metric("vllm_hidrop_requests_total")
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
        deadline = time.monotonic() + 60
        while server.metric("vllm_hidrop_requests_total") == ended:
            assert time.monotonic() < deadline, "the request neither ended nor was aborted"
            time.sleep(0.1)
        if server.metric("vllm_hidrop_requests_total", mode="aborted") > aborted:
            break
    assert server.metric("vllm_hidrop_requests_total", mode="aborted") == aborted + 1
    server.chat([])  # the gauge is of the last step
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.http.get("/ready").status_code == 200


def test_echo_is_for_text_alone(server: Server) -> None:
    """Completions take no images, so echo is never of a pruned prompt; prompt log-probabilities of one are a 400."""
    body: dict[str, Any] = {"model": server.model, "prompt": "what colour", "max_tokens": 2, "temperature": 0}
    plain = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    echoed = server.http.post("/v1/completions", json=body | {"echo": True}).json()["choices"][0]["text"]
    assert echoed == f"what colour{plain}"
    refused = server.http.post("/v1/chat/completions", json=server.body([image_url()], prompt_logprobs=1))
    assert refused.status_code == 400
    kept = server.http.post("/v1/chat/completions", json=server.body([], prompt_logprobs=1))
    assert kept.status_code == 200
    assert kept.json()["prompt_logprobs"]
