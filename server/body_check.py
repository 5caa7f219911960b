"""What a parsed body may hold, read once before any of vLLM's models sees it; the first fault ends the reading.

Knows the fields of vLLM's routes that are lists, media, text or names; what they mean is vLLM's business. Every route
is read in the same way, also one that is not known here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hidrop_server.media_parts import MAX_PARTS, SYSTEM_BLOCKS, MediaParts
from hidrop_server.options import check_options
from hidrop_server.refusals import BodyRefused
from hidrop_server.scalar_fields import check_scalars
from hidrop_server.typed_items import response_items, response_tools

MAX_FIELDS = 256
"""Of a body, at its top."""
MAX_ELEMENTS = 8192
"""Of an array that is not all numbers, or of an object. A wrong one costs vLLM an error for each."""
MAX_MESSAGES = 4096
"""Of a body, all its conversations together."""
MAX_TOOLS = 512
MAX_KEY_CHARS = 1024
MAX_GRAMMAR_CHARS = 1 << 20
CHARS_PER_TOKEN = 32
"""A text longer than this many characters for each token of the model's length cannot become a prompt."""
MIN_TEXT_CHARS = 1 << 16

CONTENTS = ("content", "output")
"""Keys of lists of parts, on whatever route."""
GRAMMARS = ("response_format", "structured_outputs")
FREE = frozenset(
    {
        *GRAMMARS,
        "annotations",
        "arguments",
        "citations",
        "criteria",
        "ec_transfer_params",
        "format",
        "input_schema",
        "json_schema",
        "kv_transfer_params",
        "logprobs",
        "metadata",
        "output_config",
        "parameters",
        "schema",
        "state",
        "text",
        "tool",
        "tools",
    }
)
"""Keys whose value is the client's own JSON: it has no parts and no options."""
DATA = ("data", "url", "image_url")
"""Keys of media outside of the client's own JSON; they are not text, and have a limit of their own."""
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


@dataclass(frozen=True)
class BodyLimits:
    """Limits of a server.

    Attributes:
        max_values: of a body; ``--max-json-values``.
        max_text_chars: of one prompt.
    """

    max_values: int
    max_text_chars: int

    @classmethod
    def of(cls, max_values: int, max_model_len: int) -> "BodyLimits":
        """For a model's length."""
        return cls(max_values, max(MIN_TEXT_CHARS, CHARS_PER_TOKEN * max_model_len))


class BodyCheck:
    """Reads a body.

    Args:
        limits: of this server.
        parts: that it takes.
    """

    def __init__(self, limits: BodyLimits, parts: MediaParts) -> None:
        self.limits = limits
        self.parts = parts
        self.items = response_items()
        self.response_tools = response_tools()

    def check(self, path: str, body: Any) -> None:
        """Check a whole body.

        Raises:
            BodyRefused: what is not taken; one line that names the field.
        """
        if not isinstance(body, dict):
            raise BodyRefused("the body must be a JSON object")
        if len(body) > MAX_FIELDS:
            raise BodyRefused(f"the body has more than {MAX_FIELDS} fields")
        check_options(body.get("vllm_xargs"))
        check_scalars(body)
        walk = _Walk(self, path.startswith(ANTHROPIC_PATH), READ.get(path.removesuffix("/render")))
        walk.read(body)
        self._check_media(path, body)
        self._check_lists(path, body)
        self._check_product(body)
        num_texts = max(1, *(len(each) for each in _batches(body)), 1)
        if walk.num_chars > num_texts * self.limits.max_text_chars:
            raise BodyRefused(self.too_long("the text of the body"))

    def too_long(self, what: str) -> str:
        """Says that a text is."""
        return f"{what} is longer than {self.limits.max_text_chars} characters ({CHARS_PER_TOKEN} x --max-model-len)"

    def _check_media(self, path: str, body: Mapping[str, Any]) -> None:
        known = {"prompt_embeds"} if self.parts.embeds else set()
        if path.startswith(DECISIONS_PATH):
            known |= {"images", "videos"}
        self.parts.check_keys(body, "", known)
        for name in ("messages", "input"):
            for where, message in _messages(body.get(name), name):
                self.parts.check_keys(message, where)

    def _check_lists(self, path: str, body: Mapping[str, Any]) -> None:
        messages = body.get("messages")
        if isinstance(messages, list):
            self._check_messages(messages)
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

    def _check_messages(self, messages: list[Any]) -> None:
        for number, (where, message) in enumerate(_messages(messages, "messages")):
            if number >= MAX_MESSAGES:
                raise BodyRefused(f"messages: at most {MAX_MESSAGES}")
            _check_message(message, where)
            _check_answer(message, where, unread=())

    def _check_product(self, body: Mapping[str, Any]) -> None:
        """Each sequence takes the sampling fields along."""
        own = {key: value for key, value in body.items() if key not in ("messages", "prompt", "input", "tools")}
        sequences = _number(body.get("n")) * max(1, *(len(each) for each in _batches(body)), 1)
        if sequences > 1 and sequences * _num_values(own) > 4 * self.limits.max_values:
            raise BodyRefused(
                f"{sequences} sequences with these sampling fields are more than {4 * self.limits.max_values} values "
                f"(4 x --max-json-values {self.limits.max_values})"
            )


class _Walk:
    """One pass over all of a body."""

    def __init__(self, check: BodyCheck, anthropic: bool, read: Sequence[str] | None) -> None:
        self.check = check
        self.anthropic = anthropic
        self.read_fields = read
        self.num_chars = 0
        self.num_parts = 0

    def read(self, body: dict[str, Any]) -> None:
        """Look at every value.

        Raises:
            BodyRefused: one that is not taken.
        """
        waiting: list[tuple[Any, str, bool]] = [(body, "", False)]
        while waiting:
            value, where, is_free = waiting.pop()
            if isinstance(value, dict):
                waiting += self._of_object(value, where, is_free)
            else:
                waiting += self._of_array(value, where, is_free)

    def _of_object(self, value: dict[str, Any], where: str, is_free: bool) -> Iterator[tuple[Any, str, bool]]:
        self._check_size(value, where)
        for key, each in value.items():
            if len(key) > MAX_KEY_CHARS:
                raise BodyRefused(f"{where or 'the body'}: a key is longer than {MAX_KEY_CHARS} characters")
            if not is_free and key.startswith("hidrop"):
                self._refuse_option(where)
            place = f"{where}.{key[:80]}" if where else key[:80]
            if isinstance(each, str):
                self._text(each, place, is_media=key in DATA and not is_free)
            elif isinstance(each, dict | list):
                if key in CONTENTS and isinstance(each, list) and not is_free:
                    self._parts(each, place)
                yield each, place, is_free or key in FREE or (key == "input" and isinstance(each, dict))

    def _of_array(self, value: list[Any], where: str, is_free: bool) -> Iterator[tuple[Any, str, bool]]:
        if value and set(map(type, value)) <= {int}:
            return
        self._check_size(value, where)
        for index, each in enumerate(value):
            if isinstance(each, str):
                self._text(each, f"{where}.{index}", is_media=where == "images")
            elif isinstance(each, dict | list):
                yield each, f"{where}.{index}", is_free

    def _check_size(self, value: dict[str, Any] | list[Any], where: str) -> None:
        if len(value) > MAX_ELEMENTS:
            raise BodyRefused(f"{where or 'the body'}: more than {MAX_ELEMENTS} elements")

    def _refuse_option(self, where: str) -> None:
        if where != "vllm_xargs":
            place = f"in {where}" if where else "at the top of the body"
            raise BodyRefused(f"{place}: options of hidrop are read from vllm_xargs", "options")

    def _text(self, text: str, where: str, is_media: bool) -> None:
        if is_media:
            return
        if where.startswith(GRAMMARS):
            if len(text) > MAX_GRAMMAR_CHARS:
                raise BodyRefused(f"{where}: longer than {MAX_GRAMMAR_CHARS} characters")
            return
        self.num_chars += len(text)
        if len(text) > self.check.limits.max_text_chars:
            raise BodyRefused(self.check.too_long(where))

    def _parts(self, parts: list[Any], where: str) -> None:
        self.num_parts += len(parts)
        if self.num_parts > MAX_PARTS:
            raise BodyRefused(f"{where}: the body has more than {MAX_PARTS} parts")
        has_media = self.check.parts.check(parts, where, self.anthropic)
        if has_media and self.read_fields is not None and where.partition(".")[0] not in self.read_fields:
            raise BodyRefused(f"{where}: this route reads no media from there", "media")


def _messages(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, or of a list of lists; what is neither is for the models to refuse."""
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
    if message["role"] == "system" and isinstance(content, list):
        _check_system(content, f"{where}.content")
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
    """Images that vLLM drops from what the assistant has said: ``unread`` parts, and those in results of its tools."""
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, list):
        return
    for index, part in enumerate(content):
        result = part.get("content") if part["type"] == "tool_result" else None
        inner = [each["type"] for each in result] if isinstance(result, list) else []
        if part["type"] in unread or "image" in inner:
            raise BodyRefused(f"{where}.content.{index}: an image that the assistant has sent is not read", "media")


def _check_system(blocks: list[Any], where: str) -> None:
    """Anthropic's system prompt is text; OpenAI's is what its model's template makes of it."""
    for index, block in enumerate(blocks):
        if not isinstance(block, dict):
            raise BodyRefused(f"{where}.{index}: must be an object with a type")
        if block.get("type") == "image" or (where == "system" and block.get("type") not in SYSTEM_BLOCKS):
            raise BodyRefused(f"{where}.{index}.type: a system prompt has one of {', '.join(SYSTEM_BLOCKS)}", "media")


def _batches(body: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Lists whose every element is a prompt of its own."""
    for name, kind in (("messages", list), ("prompt", str | list), ("input", str | list), ("items", str | list)):
        value = body.get(name)
        if isinstance(value, list) and value and isinstance(value[0], kind):
            yield value


def _number(n: Any) -> int:
    """As pydantic reads it; what it refuses is one."""
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
