"""What a body may hold, on every route alike; no engine."""

from functools import cache
from typing import Any

import pytest

from hidrop_server.errors import BodyRefused
from hidrop_server.http.body_check import BodyCheck
from hidrop_server.http.body_limits import BodyLimits
from hidrop_server.media.parts import MediaParts
from tests.server.http.fields import typed_fields

CHAT, BATCH, RESPONSES = "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"
MESSAGES, COMPLETIONS, TOKENIZE = "/v1/messages", "/v1/completions", "/tokenize"
ELSEWHERE = "/a/route/of/tomorrow"
LIMITS = BodyLimits.of(max_values=1 << 18, max_model_len=4096, max_grammar_kb=64)
URL = {"url": "http://127.0.0.1:9/x"}


@cache
def checking(*takes: str) -> BodyCheck:
    return BodyCheck(LIMITS, MediaParts(takes), typed_fields())


def check(path: str, body: Any, *takes: str) -> None:
    checking(*(takes or ("image",))).check(path, body)


def refusal(path: str, body: Any, *takes: str) -> BodyRefused:
    with pytest.raises(BodyRefused) as caught:
        check(path, body, *takes)
    assert "\n" not in caught.value.says
    assert len(caught.value.says) <= 500
    return caught.value


def holding(path: str, parts: list[Any], role: str = "user") -> dict[str, Any]:
    """The parts in a message, as the route has it."""
    message = {"role": role, "content": parts}
    if path == RESPONSES:
        return {"input": [message]}
    return {"messages": [[message]] if path == BATCH else [message]}


PATHS = (CHAT, BATCH, RESPONSES, MESSAGES, TOKENIZE, CHAT + "/render", "/invocations", ELSEWHERE)
ONLY_FROM_PYTHON: dict[str, Any] = {
    "image_pil": {"type": "image_pil", "image_pil": URL["url"]},
    "image_pil without a type": {"image_pil": URL["url"]},
    "image_pil by a uuid": {"type": "text", "text": "x", "uuid": "1", "image_pil": URL["url"]},
    "an image without a type": {"image_url": URL["url"]},
    "embeddings": {"type": "image_embeds", "image_embeds": "AAAA"},
    "embeddings by a uuid": {"type": "text", "text": "x", "uuid": "1", "image_embeds": "AAAA"},
    "prompt embeddings": {"type": "prompt_embeds", "data": "AAAA"},
    "sound": {"type": "audio_url", "audio_url": URL},
    "sound as data": {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    "film": {"type": "video_url", "video_url": URL},
    "a file": {"type": "input_file", "file_id": "x"},
    "a type of another model": {"type": "image_grid_thw"},
    "a type that is no word": {"type": ["image_url"], "image_url": URL},
    "an image beside text": {"type": "text", "text": "x", "image": "AAAA"},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ONLY_FROM_PYTHON)
def test_a_part_that_is_not_on_the_list_is_refused_on_every_route(path: str, name: str) -> None:
    assert refusal(path, holding(path, [ONLY_FROM_PYTHON[name]])).reason == "media"
    assert refusal(path, holding(path, [{"type": "text", "text": "x"}, ONLY_FROM_PYTHON[name]])).reason == "media"


UNUSABLE: dict[str, tuple[str, Any]] = {
    "no source": (MESSAGES, holding(MESSAGES, [{"type": "image", "source": None}])),
    "a file's source": (MESSAGES, holding(MESSAGES, [{"type": "image", "source": {"type": "file", "file_id": "x"}}])),
    "a source without a type": (MESSAGES, holding(MESSAGES, [{"type": "image", "source": {"data": "AAAA"}}])),
    "a source without data": (MESSAGES, holding(MESSAGES, [{"type": "image", "source": {"type": "base64"}}])),
    "a document": (MESSAGES, holding(MESSAGES, [{"type": "document", "source": {"type": "text", "data": "x"}}])),
    "in a tool's result": (
        MESSAGES,
        holding(
            MESSAGES, [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": None}]}]
        ),
    ),
    "in a result of the assistant's": (
        MESSAGES,
        holding(
            MESSAGES,
            [
                {
                    "type": "tool_result",
                    "content": [{"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:9/"}}],
                }
            ],
            "assistant",
        ),
    ),
    "in a system prompt": (MESSAGES, {"system": [{"type": "image", "source": {"type": "base64", "data": "AAAA"}}]}),
    "in a system message": (
        MESSAGES,
        holding(MESSAGES, [{"type": "image", "source": {"type": "base64", "data": "AAAA"}}], "system"),
    ),
    "messages of completions": (
        COMPLETIONS,
        {"prompt": "x", **holding(CHAT, [{"type": "image_url", "image_url": URL}])},
    ),
    "input of a chat": (CHAT, {"messages": [], **holding(RESPONSES, [{"type": "image_url", "image_url": URL}])}),
    "multi_modal_data": (COMPLETIONS, {"prompt": "x", "multi_modal_data": {"image": "AAAA"}}),
    "prompt_embeds": (COMPLETIONS, {"prompt": "x", "prompt_embeds": "AAAA"}),
    "images of a body": (CHAT, {"messages": [], "images": ["AAAA"]}),
    "images of a message": (CHAT, {"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}),
    "image_url of a message": (CHAT, {"messages": [{"role": "user", "content": "x", "image_url": URL}]}),
    "a null url": (CHAT, holding(CHAT, [{"type": "image_url", "image_url": None}])),
    "an empty url": (CHAT, holding(CHAT, [{"type": "image_url", "image_url": {"url": ""}}])),
    "a url of numbers": (CHAT, holding(CHAT, [{"type": "image_url", "image_url": {"url": 5}}])),
    "a file of responses": (RESPONSES, holding(RESPONSES, [{"type": "input_image", "file_id": "x"}])),
    "what the assistant has sent": (
        RESPONSES,
        holding(RESPONSES, [{"type": "input_image", "image_url": "data:,", "detail": "auto"}], "assistant"),
    ),
    "a screenshot": (
        RESPONSES,
        {"input": [{"type": "computer_call_output", "call_id": "a", "output": {"image_url": "http://127.0.0.1:9/"}}]},
    ),
    "in a function's output": (
        RESPONSES,
        {"input": [{"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image"}]}]},
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_image_that_cannot_be_used_is_not_dropped(name: str) -> None:
    path, body = UNUSABLE[name]
    refused = refusal(path, body)
    assert refused.reason == "media" or name == "a screenshot"


def test_what_the_model_reads_is_taken() -> None:
    check(CHAT, holding(CHAT, [{"type": "video_url", "video_url": URL}]), "image", "video")
    assert "image_url" not in refusal(CHAT, holding(CHAT, [{"type": "image_url", "image_url": URL}]), "text").says


def test_a_model_without_videos_says_so() -> None:
    refused = refusal(CHAT, holding(CHAT, [{"type": "video_url", "video_url": URL}]))
    assert refused.says.endswith(".type: this model, as it is served here, takes no video")
    assert refused.reason == "media"


@pytest.mark.parametrize(
    "video_url", [None, {}, {"url": None}, {"url": ""}, {"url": 5}, "data:video/mp4;base64,AAAA", []]
)
def test_a_video_that_cannot_be_used_is_not_dropped(video_url: Any) -> None:
    refused = refusal(CHAT, holding(CHAT, [{"type": "video_url", "video_url": video_url}]), "video")
    assert "video_url" in refused.says
    assert refused.reason == "media"


TAKEN: dict[str, tuple[str, Any]] = {
    "an image": (CHAT, holding(CHAT, [{"type": "image_url", "image_url": {**URL, "detail": "low"}, "uuid": "a"}])),
    "a known image": (CHAT, holding(CHAT, [{"type": "image_url", "image_url": None, "uuid": "a"}])),
    "cached text": (CHAT, holding(CHAT, [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}])),
    "a tool's answer": (CHAT, {"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}),
    "a call": (
        CHAT,
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}],
                }
            ]
        },
    ),
    "a schema with our words": (
        CHAT,
        {
            "messages": [],
            "tools": [
                {
                    "function": {
                        "name": "f",
                        "parameters": {"properties": {"image_pil": {}, "hidrop": {}, "content": [5]}},
                    }
                }
            ],
            "metadata": {"hidrop_run": "5"},
        },
    ),
    "responses": (
        RESPONSES,
        {
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": "data:,"}, {"type": "input_text", "text": "x"}],
                },
                {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
                {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "a", "output": "x"},
                {
                    "type": "message",
                    "id": "m",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "x", "annotations": [], "logprobs": None}],
                },
            ]
        },
    ),
    "messages": (
        MESSAGES,
        {
            "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
                    ],
                },
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {"hidrop": 1, "content": [5]}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]},
            ],
        },
    ),
    "prompts": (COMPLETIONS, {"prompt": ["x", "y"]}),
    "tokens": (COMPLETIONS, {"prompt": [[1, 2], [3]]}),
    "200,000 tokens": ("/detokenize", {"tokens": list(range(200_000))}),
    "a picture of 20 MB": (CHAT, holding(CHAT, [{"type": "image_url", "image_url": {"url": "x" * (20 << 20)}}])),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_clients_send_is_taken(name: str) -> None:
    check(*TAKEN[name])


OPTIONS: dict[str, Any] = {
    "at the top": {"hidrop": "off"},
    "another key at the top": {"hidrop_keep": [1]},
    "where the OpenAI client would merge it": {"extra_body": {"hidrop": "off"}},
    "for the template": {"chat_template_kwargs": {"hidrop": "off"}},
    "in a message": {"messages": [{"role": "user", "content": "x", "hidrop": "off"}]},
    "true for a count": {"vllm_xargs": {"hidrop_keep": [True, 1]}},
    "nulls": {"vllm_xargs": {"x": [None]}},
    "true for a word": {"vllm_xargs": {"hidrop": True}},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_where_nobody_reads_it_is_refused(path: str, name: str) -> None:
    refused = refusal(path, {"messages": [], **OPTIONS[name]})
    assert refused.reason == "options"
    assert "vllm_xargs" in refused.says


FIELDS: dict[str, Any] = {
    "n": True,
    "max_tokens": False,
    "temperature": True,
    "truncate_prompt_tokens": True,
    "stream_interval": True,
    "request_id": "x" * 257,
    "session_id": "x" * 257,
    "user": "x" * 1025,
    "model": "x" * 1025,
    "stop": ["x" * 1025],
    "bad_words": ["x"] * 1025,
    "stop_token_ids": ["1"],
    "allowed_token_ids": [[]],
    "logit_bias": {str(n): 1 for n in range(1025)},
    "metadata": {str(n): "x" for n in range(65)},
    "tools": [{}] * 513,
    "prompt": ["x", 1],
    "items": [[1], ["x"]],
    "documents": [{}] * 1025,
    "vllm_xargs": {"x": [1] * 4097},
    "response_format": {"type": "structural_tag", "structures": [[]] * 257},
    "unknown": [None] * 8193,
    "another": "x" * (LIMITS.max_text_chars + 1),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_too_long_or_of_a_wrong_type_is_refused_by_its_name(name: str) -> None:
    refused = refusal(CHAT, {"messages": [], name: FIELDS[name]})
    assert refused.says.startswith(("vllm_xargs.x", name))
    assert "xxx" not in refused.says


MESSAGE = {"role": "user", "content": "x"}
TEXT = {"type": "text", "text": "x"}
SHAPES: dict[str, tuple[str, Any]] = {
    "the body has more than 256 fields": (CHAT, {f"f{n}": 1 for n in range(257)}),
    "the body: a key is longer than 1024": (CHAT, {"x" * 1025: 1}),
    "response_format is 195 KiB large": (CHAT, {"messages": [], "response_format": {"x": "x" * 200_000}}),
    "messages: at most 4096": (CHAT, {"messages": [MESSAGE] * 4097}),
    "messages.0: must be an object": (CHAT, {"messages": ["x"]}),
    "messages.0.0: must be an object": (BATCH, {"messages": [["x"]]}),
    "messages.0.role: must be a string": (CHAT, {"messages": [{"role": 5, "content": "x"}]}),
    "messages.0.content: must be a string or a list": (CHAT, {"messages": [{"role": "user", "content": 5}]}),
    "messages.0.tool_calls: must be a list": (CHAT, {"messages": [{"role": "assistant", "tool_calls": {}}]}),
    "messages.0.tool_calls.0: must be an object with": (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}]},
    ),
    "messages.0.tool_calls.0.function.arguments: must": (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}]},
    ),
    "messages.0.content: the body has more than 4096 parts": (CHAT, holding(CHAT, [TEXT] * 4097)),
    "messages.0.content.0: a part must be an object": (CHAT, holding(CHAT, ["x"])),
    "messages.0.content.0.text: must be a string": (CHAT, holding(CHAT, [{"type": "text", "text": 5}])),
    "messages.0.content.0.uuid: must be a string of at most 256": (
        CHAT,
        holding(CHAT, [{"type": "image_url", "image_url": URL, "uuid": "x" * 257}]),
    ),
    "messages.0.content.0.source.media_type: must": (
        MESSAGES,
        holding(MESSAGES, [{"type": "image", "source": {"type": "base64", "data": "AAAA", "media_type": 5}}]),
    ),
    "prompt: at most 8192 prompts": (COMPLETIONS, {"prompt": ["x"] * 8193}),
    "prompt.1: must be a list of whole numbers": (COMPLETIONS, {"prompt": [[1], ["x"]]}),
    "documents.0: must be an object of texts": (CHAT, {"messages": [], "documents": [{"x": None}]}),
    "stop.1: must be a string": (CHAT, {"messages": [], "stop": ["x", 5]}),
    "input: at most 1024 items": (RESPONSES, {"input": [MESSAGE] * 1025}),
    "input.0: must be an object": (RESPONSES, {"input": [5]}),
    "input.0.call_id: Input should be a valid string": (
        RESPONSES,
        {"input": [{"type": "function_call", "call_id": 5, "name": "f", "arguments": "{}"}]},
    ),
}


@pytest.mark.parametrize("says", SHAPES)
def test_a_wrong_shape_is_named_with_its_place(says: str) -> None:
    assert refusal(*SHAPES[says]).says.startswith(says)


def test_fields_are_those_of_vllms_models() -> None:
    """Names that vLLM has for what it reads: one that a later version has is bounded without a word here."""
    fields = typed_fields()
    assert {
        "n",
        "best_of",
        "top_p",
        "seed",
        "stream_interval",
        "max_output_tokens",
        "prompt_logprobs",
    } <= fields.numbers
    assert not {"logprobs", "stream", "echo"} & fields.numbers
    assert {"model", "user", "request_id", "cache_salt", "tool_choice", "stop", "service_tier"} <= fields.names
    assert not {"prompt", "input", "chat_template", "instructions", "system", "query"} & fields.names
    assert fields.words == {"bad_words", "include", "stop", "stop_sequences"}
    assert {"allowed_token_ids", "stop_token_ids", "logprob_token_ids", "label_token_ids", "tokens"} == fields.tokens


def test_many_small_texts_are_one_prompt_and_several_prompts_are_several() -> None:
    half = {"role": "user", "content": "x" * (LIMITS.max_text_chars // 2 - 9)}
    check(CHAT, {"messages": [half] * 2})
    assert "--max-model-len" in refusal(CHAT, {"messages": [half] * 3}).says
    check(BATCH, {"messages": [[half]] * 3})


def test_sampling_fields_are_counted_for_every_sequence() -> None:
    wide = {"allowed_token_ids": list(range(200_000))}
    check(CHAT, {"messages": [], "n": 4, **wide})
    for body in ({"n": 8}, {"n": "8"}, {"prompt": ["x"] * 8}):
        assert "--max-json-values" in refusal(COMPLETIONS, {**wide, **body}).says


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, 10**100])
@pytest.mark.parametrize(
    "field", ["top_k", "seed", "stream_interval", "vllm_xargs", "stop_token_ids", "a field of tomorrow"]
)
def test_a_number_that_the_wire_to_the_engine_cannot_carry_is_refused(field: str, number: int) -> None:
    value = {"vllm_xargs": {"session_id": number}, "stop_token_ids": [1, number]}.get(field, number)
    assert "more than 64 bits" in refusal(CHAT, holding(CHAT, [{"type": "text", "text": "x"}]) | {field: value}).says
    check(CHAT, holding(CHAT, [{"type": "text", "text": "x"}]) | {"seed": (1 << 63) - 1})
    check(CHAT, holding(CHAT, [{"type": "text", "text": "x"}]) | {"response_format": {"schema": {"maximum": number}}})
