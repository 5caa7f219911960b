"""Bodies that cost their reader more than their sender: wide, deep, wrongly typed, with huge fields; for every route.

Each is made when it is asked for, because all of them together are gigabytes.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

MIB = 1 << 20
Maker = Callable[[], bytes]


def routes(model: str) -> dict[str, dict[str, Any]]:
    """A small valid body for every route that takes one."""
    message = {"role": "user", "content": "what ?"}
    one: dict[str, Any] = {"model": model, "max_tokens": 1}
    return {
        "/v1/chat/completions": {**one, "messages": [message]},
        "/v1/chat/completions/batch": {**one, "messages": [[message]]},
        "/v1/responses": {"model": model, "input": "what ?", "max_output_tokens": 1},
        "/v1/messages": {**one, "messages": [message]},
        "/v1/messages/count_tokens": {"model": model, "messages": [message]},
        "/v1/completions": {**one, "prompt": "what ?"},
        "/tokenize": {"model": model, "messages": [message]},
        "/detokenize": {"model": model, "tokens": [1]},
        "/generative_scoring": {"model": model, "query": "what ?", "items": ["red"], "label_token_ids": [1]},
        "/v1/systemone": {"model": model, "state": "what ?", "questions": {"q": {"type": "yes_no"}}},
    }


TOOL = {"type": "function", "name": "f", "input_schema": {}, "function": {"name": "f", "parameters": {}}}
WRONG: dict[str, Any] = {
    "numbers": 5,
    "nulls": None,
    "empty objects": {},
    "empty lists": [],
    "wrong messages": {"role": 5, "content": 5},
    "messages of wrong parts": {"role": "user", "content": [{"type": "text", "text": 5}] * 3},
    "messages of unknown parts": {
        "role": "user",
        "content": [{"type": "image_pil", "image_pil": "http://127.0.0.1:9/"}],
    },
    "messages of numbers": {"role": "user", "content": [5] * 3},
    "wrong calls": {"role": "assistant", "tool_calls": [{"id": 5}] * 3},
    "wrong items": {"type": "function_call", "call_id": 5, "name": [], "arguments": {}},
    "strings": "x",
}
"""Each 2,000 times where a route has messages, items, prompts or tokens."""
CONTENT = {
    "/v1/responses": "input",
    "/v1/completions": "prompt",
    "/detokenize": "tokens",
    "/generative_scoring": "items",
    "/v1/systemone": "questions",
}
LISTS = (
    "stop",
    "bad_words",
    "stop_token_ids",
    "allowed_token_ids",
    "logprob_token_ids",
    "tools",
    "documents",
    "include",
)


def shapes(path: str, base: dict[str, Any]) -> Iterator[tuple[str, Maker]]:
    """Names and bodies; ``base`` is one of :func:`routes`."""
    yield from _of_any_json(base)
    name = CONTENT.get(path, "messages")
    for what, wrong in WRONG.items():
        yield f"2,000 {what}", _with(base, name, partial(_repeated, wrong))
        yield f"2,000 {what} in a list", _with(base, name, partial(_repeated, wrong, inside=True))
    for field in LISTS:
        yield f"{field}: 8,000 lists", _with(base, field, lambda: [[]] * 8000)
        yield f"{field}: 200,000 words", _with(base, field, lambda: ["x"] * 200_000)
    yield from _fields(base)
    yield from _messages(path, base, name)


def _of_any_json(base: dict[str, Any]) -> Iterator[tuple[str, Maker]]:
    yield "9 MB of lists", _raw(base, lambda: b"[" + b"[]," * 3_000_000 + b"1]")
    yield "9 MB of objects", _raw(base, lambda: b"[" + b"{}," * 3_000_000 + b"1]")
    yield "100,000 deep", _raw(base, lambda: b"[" * 100_000)
    yield "60 deep, and wide", _raw(base, lambda: b'{"a":[1,' * 29 + b"1" + b"]}" * 29)
    yield "objects 100,000 deep", _raw(base, lambda: b'{"a":' * 100_000)
    yield "30 MB of spaces", _raw(base, lambda: b" " * (30 * MIB) + b"1")
    yield "a string of 30 MB", _raw(base, lambda: b'"' + b"x" * (30 * MIB) + b'"')
    yield "an emoji at the end of 28 MB", _raw(base, lambda: b'"' + b"x" * (28 * MIB) + b'\xf0\x9f\x98\x80"')
    yield (
        "28 MB of ASCII beside an emoji",
        _raw(base, lambda: b'{"data":"' + b"x" * (28 * MIB) + b'","a":"\xf0\x9f\x98\x80"}'),
    )
    yield "28 MB of escapes", _raw(base, lambda: b'"' + b"\\n" * (14 * MIB) + b'"')
    yield "a million escapes", _raw(base, lambda: b'"' + b"\\u0041" * 1_000_000 + b'"')
    yield "a number of a million digits", _raw(base, lambda: b"1" * 1_000_000)
    yield "100,000 numbers of 300 digits", _raw(base, lambda: b"[" + b",".join([b"7" * 300] * 100_000) + b"]")
    yield "as many values as may be", _raw(base, lambda: b"[" + b",".join([b"1"] * 262_000) + b"]")
    yield "8,000 words", _raw(base, lambda: b"[" + b",".join([b'"x"'] * 8_000) + b"]")
    words = b"[" + b",".join([b'"x"'] * 8_000) + b"]"
    yield "30 lists of 8,000 words", _raw(base, lambda: b"[" + b",".join([words] * 30) + b"]")
    pairs = b"{" + b",".join(b'"%d":"x"' % n for n in range(8_000)) + b"}"
    yield "30 objects of 8,000 words", _raw(base, lambda: b"[" + b",".join([pairs] * 30) + b"]")
    yield "200,000 words", _raw(base, lambda: b"[" + b",".join([b'"x"'] * 200_000) + b"]")
    yield "16,000 objects", _raw(base, lambda: b'{"a":[' + b",".join([b"[{}]"] * 8_000) + b"]}")
    yield "a surrogate", _raw(base, lambda: b'"\\ud800"')
    yield "no UTF-8", _raw(base, lambda: b'"' + b"\xff" * MIB + b'"')
    yield "no end", lambda: b'{"a": "' + b"x" * (10 * MIB)
    yield "only quotation marks", lambda: b'"' * (4 * MIB)
    yield "UTF-16", lambda: json.dumps(base).encode("utf-16")
    yield "100,000 fields", lambda: json.dumps({**base, **{f"f{n}": n for n in range(100_000)}}).encode()
    yield "8,000 fields", lambda: json.dumps({**base, **{f"f{n}": [] for n in range(8_000)}}).encode()
    yield "a field's name of 1 MB", lambda: json.dumps({**base, "f" * MIB: 1}).encode()
    yield "one field 100,000 times", lambda: b'{"a":1,' * 1 + b'"a":1,' * 100_000 + json.dumps(base).encode()[1:]


def _fields(base: dict[str, Any]) -> Iterator[tuple[str, Maker]]:
    long = "x" * (2 * MIB)
    for field in ("model", "request_id", "user", "cache_salt", "stop", "tool_choice", "service_tier", "instructions"):
        yield f"{field} of 2 MB", _with(base, field, lambda: long)
    yield "100,000 biases", _with(base, "logit_bias", lambda: {str(n): 1 for n in range(100_000)})
    yield "8,000 wrong biases", _with(base, "logit_bias", lambda: {str(n): [] for n in range(8_000)})
    yield "8,000 options", _with(base, "vllm_xargs", lambda: {f"x{n}": [[]] for n in range(8_000)})
    yield "an option of 8,000 lists", _with(base, "vllm_xargs", lambda: {"hidrop_keep": [[]] * 8_000})
    yield "metadata of 8,000 lists", _with(base, "metadata", lambda: {str(n): [] for n in range(8_000)})
    yield "an option of 4,000 nulls", _with(base, "vllm_xargs", lambda: {f"x{n}": [None] * 4_000 for n in range(60)})
    yield "1,000 documents of nulls", _with(base, "documents", lambda: [{f"f{n}": None for n in range(60)}] * 1_000)
    yield "8,000 variables", _with(base, "prompt", lambda: {"id": "x", "variables": {str(n): [] for n in range(8_000)}})
    yield "8,000 structures", _with(base, "response_format", _structures)
    yield "8,000 wrong choices", _with(base, "structured_outputs", lambda: {"choice": [5] * 8_000})
    yield "8,000 messages before", _with(base, "previous_input_messages", lambda: [{"role": 5, "content": [5]}] * 7_000)
    yield "512 tools", _with(base, "tools", lambda: [TOOL] * 512)
    yield "500 wrong tools", _with(base, "tools", lambda: [{"type": "function", "function": []}] * 500)
    yield "260,000 tokens allowed", _with(base, "allowed_token_ids", lambda: list(range(260_000)))
    yield "a tool choice of 8,000 lists", _with(base, "tool_choice", lambda: {"function": {"name": [[]] * 8_000}})
    yield "n = 10 ** 300", _with(base, "n", lambda: 10**300)
    yield "stop words of 1 MB", _with(base, "stop", lambda: [long] * 4)


def _messages(path: str, base: dict[str, Any], name: str) -> Iterator[tuple[str, Maker]]:
    text = {"type": "input_text" if path == "/v1/responses" else "text", "text": "x"}

    def several(messages: Callable[[], list[Any]]) -> Maker:
        return _with(base, name, lambda: [messages()] if path.endswith("batch") else messages())

    yield "4,000 messages", several(lambda: [{"role": "user", "content": "x"}] * 4000)
    yield "1,000 messages of parts", several(lambda: [{"role": "user", "content": [text] * 2}] * 1000)
    yield "a message of 4,000 parts", several(lambda: [{"role": "user", "content": [text] * 4000}])
    yield "one message more than wrong", several(lambda: [{"role": "user", "content": "x"}] * 1000 + [{"role": 5}])
    yield "conversations", _with(base, name, lambda: [[{"role": "user", "content": "x"}]] * 1000)
    yield "prompts", _with(base, name, lambda: ["x"] * 1000)
    yield "a text of 100,000 characters", several(lambda: [{"role": "user", "content": "red " * 25_000}])
    yield "4,000 pictures", several(lambda: [{"role": "user", "content": [_picture()] * 4000}])


def _repeated(value: Any, inside: bool = False) -> list[Any]:
    several = [value] * 2000
    return [several] if inside else several


def _structures() -> dict[str, Any]:
    return {"type": "structural_tag", "structures": [[]] * 8_000, "triggers": [[]] * 8_000}


def _picture() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/picture"}}


def _raw(base: dict[str, Any], value: Maker) -> Maker:
    """The value in a field that nobody knows."""
    return lambda: json.dumps(base).encode()[:-1] + b',"unknown":' + value() + b"}"


def _with(base: dict[str, Any], name: str, value: Callable[[], Any]) -> Maker:
    return lambda: json.dumps({**base, name: value()}).encode()
