"""The official OpenAI and Anthropic clients on every route they have: key, tools, structured output, reports."""

import base64
import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.server.harness import Server, image_url, kept, picture, user
from vllm_hidrop.verify.tiny_models import TOKENS_PER_IMAGE

pytestmark = pytest.mark.server

KEPT = [64, 32, 16, 8]
"""Pyramiddrop's default on eight layers."""
EXPLAIN: dict[str, Any] = {"vllm_xargs": {"hidrop_explain": True}}
TOOL = {
    "name": "paint",
    "description": "Paint it.",
    "schema": {
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    },
}
OPENAI_TOOL: Any = {
    "type": "function",
    "function": {"name": TOOL["name"], "description": TOOL["description"], "parameters": TOOL["schema"]},
}
ANTHROPIC_TOOL: Any = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["schema"]}


class Painted(BaseModel):
    """What the model must answer."""

    colour: Literal["red", "blue"]
    ok: bool


def check(report: Any) -> None:
    """A pruned request with one image that asked for an explanation."""
    assert report["mode"] == "pruned"
    assert report["method"] == "pyramiddrop"
    assert kept(report) == KEPT
    for stage in report["stages"]:
        (patches,) = stage["patches"]
        assert len(patches) == stage["kept"]
        assert patches == sorted(set(patches))
        assert set(patches) <= set(range(TOKENS_PER_IMAGE))


def messages() -> Any:
    return [user([image_url()], "what?")]


@pytest.fixture(scope="module")
def claude(guarded: Server) -> Iterator[anthropic.Anthropic]:
    """It sends its key as ``x-api-key``."""
    with anthropic.Anthropic(base_url=guarded.url, api_key=guarded.key, max_retries=0, timeout=120) as client:
        yield client


def test_a_wrong_key_is_refused_on_the_routes_of_both_clients(guarded: Server) -> None:
    with OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as wrong:
        for ask in (
            wrong.models.list,
            lambda: wrong.chat.completions.create(model="tiny", messages=messages()),
            lambda: wrong.completions.create(model="tiny", prompt="a"),
            lambda: wrong.responses.create(model="tiny", input="a"),
        ):
            with pytest.raises(openai.AuthenticationError):
                ask()
    keys: list[dict[str, Any]] = [{"api_key": "wrong"}, {"api_key": None, "auth_token": "wrong"}]
    for key in keys:
        with (
            anthropic.Anthropic(base_url=guarded.url, max_retries=0, **key) as other,
            pytest.raises(anthropic.AuthenticationError),
        ):
            other.messages.create(model="tiny", max_tokens=3, messages=[{"role": "user", "content": "a"}])


def test_the_model_list_says_what_is_pruned(guarded: Server) -> None:
    (card,) = guarded.openai.models.list().data
    description = card.model_dump()["hidrop"]
    assert (card.id, description["method"]) == ("tiny", "pyramiddrop")
    assert [stage["first_layer"] for stage in description["stages"]] == [0, 2, 4, 6]


def test_chat_explains_whole_and_streamed(guarded: Server) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": messages(),
        "max_tokens": 9,
        "temperature": 0,
        "extra_body": EXPLAIN,
    }
    whole = guarded.openai.chat.completions.create(**asked)
    check(whole.model_dump()["hidrop"])
    stream = guarded.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == (
        whole.choices[0].message.content
    )
    assert [bool(chunk.usage) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    check(chunks[-1].model_dump()["hidrop"])
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_an_unasked_request_is_not_explained(guarded: Server) -> None:
    answer = guarded.openai.chat.completions.create(model="tiny", messages=messages(), max_tokens=2).model_dump()
    assert kept(answer["hidrop"]) == KEPT
    assert all("patches" not in stage for stage in answer["hidrop"]["stages"])


def test_completions_answer(guarded: Server) -> None:
    whole = guarded.openai.completions.create(model="tiny", prompt="abc", max_tokens=4, temperature=0)
    assert whole.model_dump()["hidrop"]["mode"] == "text"
    chunks = list(
        guarded.openai.completions.create(model="tiny", prompt="abc", max_tokens=4, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_responses_explain_whole_and_streamed(guarded: Server) -> None:
    content = [
        {"type": "input_image", "image_url": image_url(), "detail": "auto"},
        {"type": "input_text", "text": "a?"},
    ]
    asked: dict[str, Any] = {
        "model": "tiny",
        "input": [{"role": "user", "content": content}],
        "max_output_tokens": 9,
        "temperature": 0,
        "extra_body": EXPLAIN,
    }
    whole = guarded.openai.responses.create(**asked)
    check(whole.model_dump()["hidrop"])
    assert whole.model_dump().get("kv_transfer_params") is None
    events = list(guarded.openai.responses.create(**asked, stream=True))
    assert events[-1].type == "response.completed"
    check(events[-1].response.model_dump()["hidrop"])
    assert events[-1].response.output_text == whole.output_text


def anthropic_messages() -> Any:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture()).decode()}
    return [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "what?"}]}]


def test_messages_explain_whole_and_streamed(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": anthropic_messages(),
        "max_tokens": 9,
        "extra_body": EXPLAIN | {"temperature": 0},
    }
    whole = claude.messages.create(**asked)
    check(whole.model_dump()["hidrop"])
    assert whole.model_dump().get("kv_transfer_params") is None
    with claude.messages.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_message()
    deltas = [event for event in events if event.type == "message_delta"]
    assert len(deltas) == 1
    check(deltas[0].model_dump()["hidrop"])
    assert final.content[0].model_dump()["text"] == whole.content[0].model_dump()["text"]
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = claude.messages.count_tokens(model="tiny", messages=anthropic_messages())
    assert counted.input_tokens == whole.usage.input_tokens


def test_messages_refuse_a_bad_option_with_a_400(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="known: hidrop"):
        claude.messages.create(
            model="tiny",
            messages=anthropic_messages(),
            max_tokens=2,
            extra_body={"vllm_xargs": {"hidrop_explian": True}},
        )


def test_responses_refuse_a_bad_option_with_a_400(guarded: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="must be true or false"):
        guarded.openai.responses.create(model="tiny", input="a", extra_body={"vllm_xargs": {"hidrop_explain": 5}})


def test_structured_output_is_parsed_by_the_client(guarded: Server) -> None:
    answer = guarded.openai.chat.completions.parse(
        model="tiny", messages=messages(), response_format=Painted, max_tokens=200, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Painted)
    assert answer.model_extra is not None
    assert answer.model_extra["hidrop"]["mode"] == "pruned"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_tool_is_called_about_a_pruned_image(guarded: Server, choice: Any) -> None:
    answer = guarded.openai.chat.completions.create(
        model="tiny", messages=messages(), tools=[OPENAI_TOOL], tool_choice=choice, max_tokens=200, temperature=0
    )
    calls: Any = answer.choices[0].message.tool_calls
    assert calls[0].function.name == "paint"
    assert json.loads(calls[0].function.arguments)["colour"] in ("red", "blue")
    assert answer.model_dump()["hidrop"]["mode"] == "pruned"


def test_a_tool_call_is_streamed(guarded: Server) -> None:
    chunks = list(
        guarded.openai.chat.completions.create(
            model="tiny",
            messages=messages(),
            tools=[OPENAI_TOOL],
            tool_choice="required",
            max_tokens=200,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    calls = [call.function for delta in deltas for call in delta.tool_calls or [] if call.function]
    assert "".join(call.name or "" for call in calls) == "paint"
    assert json.loads("".join(call.arguments or "" for call in calls))["colour"] in ("red", "blue")
    assert chunks[-1].usage is not None
    assert chunks[-1].model_dump()["hidrop"]["mode"] == "pruned"


def test_a_tool_is_used_in_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model="tiny",
        messages=anthropic_messages(),
        tools=[ANTHROPIC_TOOL],
        tool_choice={"type": "tool", "name": "paint"},
        max_tokens=200,
        extra_body={"temperature": 0},
    )
    used = [block for block in answer.content if block.type == "tool_use"]
    assert used[0].name == "paint"
    assert used[0].model_dump()["input"]["colour"] in ("red", "blue")


def test_tokens_go_there_and_back(guarded: Server) -> None:
    there = guarded.http.post("/tokenize", json={"model": "tiny", "prompt": "abc"}).json()
    assert there["count"] == len(there["tokens"])
    back = guarded.http.post("/detokenize", json={"model": "tiny", "tokens": there["tokens"][-3:]}).json()
    assert back["prompt"] == "abc"


def test_tokens_of_a_chat_with_an_image_are_what_it_is_billed_for(guarded: Server) -> None:
    new = [user([image_url(8800)], "what?")]
    counted = guarded.http.post("/tokenize", json={"model": "tiny", "messages": new}).json()["count"]
    answer = guarded.http.post("/v1/chat/completions", json={"model": "tiny", "messages": new, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == counted


def test_a_request_id_comes_back(guarded: Server) -> None:
    response = guarded.http.get("/v1/models", headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"


def test_the_playground_is_open_and_what_it_asks_is_not(guarded: Server) -> None:
    assert httpx.get(f"{guarded.url}/playground").status_code == 200
    assert httpx.get(f"{guarded.url}/v1/models").status_code == 401
