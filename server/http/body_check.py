"""Check a parsed body, on any route, before one of vLLM's models sees it; the first fault ends the reading."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hidrop_server.control.options import check_options
from hidrop_server.errors import BodyRefused
from hidrop_server.http.body_limits import MAX_FIELDS, MAX_MESSAGES, MAX_TOOLS, BodyLimits
from hidrop_server.http.body_walk import BodyWalk
from hidrop_server.http.typed_fields import TypedFields, response_items, response_tools
from hidrop_server.media.parts import SYSTEM_BLOCKS, MediaParts

CONTENT_FIELDS = ("messages", "prompt", "input", "items", "tools")  # shared by the sequences, or divided among them
ANTHROPIC_PATH = "/v1/messages"
RESPONSES_PATH = "/v1/responses"
DECISIONS_PATH = "/v1/systemone"
READ: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("messages",),
    "/v1/chat/completions/batch": ("messages",),
    "/v1/completions": (),
    "/v1/messages": ("messages", "system"),
    "/v1/messages/count_tokens": ("messages", "system"),
    "/v1/responses": ("input",),
    DECISIONS_PATH: (),
    "/detokenize": (),
    "/generative_scoring": (),
    "/tokenize": ("messages",),
}
"""Fields whose media a route reads; another route may read any."""


class BodyCheck:
    """Checks bodies by the limits of a server, the parts that it takes, and the fields of its routes."""

    def __init__(self, limits: BodyLimits, parts: MediaParts, fields: TypedFields) -> None:
        self.limits = limits
        self.parts = parts
        self.fields = fields
        self.items = response_items()
        self.response_tools = response_tools()

    def check(self, path: str, body: Any) -> None:
        """Check a whole body; BodyRefused is one line that names the field."""
        if not isinstance(body, dict):
            raise BodyRefused("the body must be a JSON object")
        if len(body) > MAX_FIELDS:
            raise BodyRefused(f"the body has more than {MAX_FIELDS} fields")
        check_grammars(body, self.limits.max_grammar_kb)
        check_options(body.get("vllm_xargs"))
        self.fields.check(body)
        read = READ.get(path.removesuffix("/render"))
        walk = BodyWalk(self.limits, self.parts, path.startswith(ANTHROPIC_PATH), read)
        walk.read(body)
        self._check_media(path, body)
        self._check_lists(path, body)
        num_prompts = max([1, *map(len, _batches(body))])
        self._check_product(body, num_prompts)
        if walk.num_chars > num_prompts * self.limits.max_text_chars:
            raise BodyRefused(self.limits.too_long("the text of the body"))

    def _check_media(self, path: str, body: Mapping[str, Any]) -> None:
        known = {"images", "videos"} if path.startswith(DECISIONS_PATH) else set()
        self.parts.check_keys(body, "", known)
        for name in ("messages", "input"):
            for where, message in _messages(body.get(name), name):
                self.parts.check_keys(message, where)

    def _check_lists(self, path: str, body: Mapping[str, Any]) -> None:
        messages = body.get("messages")
        if isinstance(messages, list):
            self._check_messages(messages, path.startswith(ANTHROPIC_PATH))
        tools, items, system = body.get("tools"), body.get("input"), body.get("system")
        if isinstance(system, list):
            _check_system(system, "system")
        if isinstance(tools, list):
            if len(tools) > MAX_TOOLS:
                raise BodyRefused(f"tools: at most {MAX_TOOLS}")
            if path.startswith(RESPONSES_PATH):
                self.response_tools.check(tools, "tools")
        if isinstance(items, list) and path.startswith(RESPONSES_PATH):
            self.items.check(items, "input")
            for where, item in _messages(items, "input"):
                _check_answer(item, where, unread=("input_image", "image_url"))

    def _check_messages(self, messages: list[Any], anthropic: bool) -> None:
        for number, (where, message) in enumerate(_messages(messages, "messages")):
            if number >= MAX_MESSAGES:
                raise BodyRefused(f"messages: at most {MAX_MESSAGES}")
            _check_message(message, where)
            _check_answer(message, where, unread=())
            if anthropic and message["role"] == "system" and isinstance(message.get("content"), list):
                _check_system(message["content"], f"{where}.content")

    def _check_product(self, body: Mapping[str, Any], num_prompts: int) -> None:
        """Bound sequences times values: every sequence has its own copy of the sampling fields."""
        own = {key: value for key, value in body.items() if key not in CONTENT_FIELDS}
        sequences = _number(body.get("n")) * num_prompts
        if sequences > 1 and sequences * _num_values(own) > 4 * self.limits.max_values:
            raise BodyRefused(
                f"{sequences} sequences with these sampling fields are more than {4 * self.limits.max_values} values "
                f"(4 x --max-json-values {self.limits.max_values})"
            )


GRAMMAR_FIELDS = ("structured_outputs", "response_format", "text")
"""Fields that hold a constraint; ``text`` is that of ``/v1/responses``, whose ``format`` is a response format."""


def check_grammars(body: Mapping[str, Any], max_kb: int) -> None:
    """Refuse constraints that are too large (BodyRefused), before vLLM's models parse them."""
    for name in GRAMMAR_FIELDS:
        num_bytes = len(json.dumps(body.get(name)))
        if num_bytes > 2 * max_kb << 10:  # control.grammars measures the text, without JSON's escapes
            says = f"{name} is {num_bytes >> 10} KiB large, over {max_kb} KiB (--max-grammar-kb)"
            raise BodyRefused(says, "grammar")


def _messages(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, or of a list of lists, with their places; vLLM's models refuse most other values."""
    for index, each in enumerate(value if isinstance(value, list) else ()):
        if isinstance(each, dict):
            yield f"{where}.{index}", each
        elif isinstance(each, list):
            for inner, message in enumerate(each):
                if not isinstance(message, dict):
                    raise BodyRefused(f"{where}.{index}.{inner}: must be an object")
                yield f"{where}.{index}.{inner}", message
        elif where == "messages":
            raise BodyRefused(f"{where}.{index}: must be an object")


def _check_message(message: Mapping[str, Any], where: str) -> None:
    if not isinstance(message.get("role"), str):
        raise BodyRefused(f"{where}.role: must be a string")
    content = message.get("content")
    if not isinstance(content, str | list | None):
        raise BodyRefused(f"{where}.content: must be a string or a list of parts")
    calls = message.get("tool_calls")
    if not isinstance(calls, list | None):
        raise BodyRefused(f"{where}.tool_calls: must be a list")
    for index, call in enumerate(calls or ()):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BodyRefused(f"{where}.tool_calls.{index}: must be an object with a function that has a name")
        if not isinstance(function.get("arguments"), str | dict | None):
            raise BodyRefused(f"{where}.tool_calls.{index}.function.arguments: must be a string")


def _check_answer(message: Mapping[str, Any], where: str, unread: Sequence[str]) -> None:
    """Refuse images that vLLM drops from an assistant's message: ``unread`` parts, and those in results of tools."""
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, list):
        return
    for index, part in enumerate(content):
        result = part.get("content") if part["type"] == "tool_result" else None
        inner = [each["type"] for each in result] if isinstance(result, list) else []
        if part["type"] in unread or "image" in inner:
            raise BodyRefused(f"{where}.content.{index}: an image that the assistant has sent is not read", "media")


def _check_system(blocks: list[dict[str, Any]], where: str) -> None:
    """Check Anthropic's blocks; what becomes of OpenAI's system prompt is up to the model's template."""
    for index, block in enumerate(blocks):
        if block["type"] not in SYSTEM_BLOCKS:
            raise BodyRefused(f"{where}.{index}.type: a system prompt has one of {', '.join(SYSTEM_BLOCKS)}", "media")


def _batches(body: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The lists of a body whose every element is a prompt of its own."""
    for name, kind in (("messages", list), ("prompt", str | list), ("input", str | list), ("items", str | list)):
        value = body.get(name)
        if isinstance(value, list) and value and isinstance(value[0], kind):
            yield value


def _number(n: Any) -> int:
    """Read ``n`` as pydantic does; 1 for what pydantic refuses."""
    try:
        return max(1, int(n))
    except (TypeError, ValueError, OverflowError):
        return 1


def _num_values(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(_num_values, value.values()))
    if isinstance(value, list):
        return 1 + (len(value) if set(map(type, value)) <= {int} else sum(map(_num_values, value)))
    return 1
