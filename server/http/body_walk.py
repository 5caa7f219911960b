"""One pass over all of a parsed body: sizes, texts, parts of messages, pruning options in the wrong place."""

from collections.abc import Iterator, Sequence
from typing import Any

from hidrop_server.errors import BodyRefused
from hidrop_server.http.body_limits import MAX_ELEMENTS, MAX_INTEGER, MAX_KEY_CHARS, MAX_PARTS, BodyLimits
from hidrop_server.media.parts import MediaParts

CONTENTS = ("content", "output", "system")  # keys of lists of parts, on every route
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
"""Keys whose value is the client's own JSON: nothing in it is read as a part or an option."""
DATA = ("data", "url", "image_url")  # keys of media (outside of FREE), which have a limit other than text
MAX_SHOWN_CHARS = 40  # of a key in an error
MAX_WHERE_CHARS = 200


class BodyWalk:
    """One pass over all of a body, which counts its characters and parts.

    ``anthropic`` says whether the messages are Anthropic's; ``read`` names the fields whose media the route reads, None
    for any.
    """

    def __init__(self, limits: BodyLimits, parts: MediaParts, anthropic: bool, read: Sequence[str] | None) -> None:
        self.limits = limits
        self.parts = parts
        self.anthropic = anthropic
        self.read_fields = read
        self.num_chars = 0
        self.num_parts = 0

    def read(self, body: dict[str, Any]) -> None:
        """Look at every value; BodyRefused for the first that is not taken."""
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
            if isinstance(each, str):
                self._text(each, where, key, is_media=key in DATA and not is_free)
            elif isinstance(each, int):
                if not is_free:
                    _check_integers((each,), _inside(where, key))
            elif isinstance(each, dict | list):
                place = _inside(where, key)
                if key in CONTENTS and isinstance(each, list) and not is_free:
                    self._parts(each, place)
                yield each, place, is_free or key in FREE or (key == "input" and isinstance(each, dict))

    def _of_array(self, value: list[Any], where: str, is_free: bool) -> Iterator[tuple[Any, str, bool]]:
        if value and set(map(type, value)) <= {int}:
            _check_integers(value, where)
            return
        self._check_size(value, where)
        for index, each in enumerate(value):
            if isinstance(each, str):
                self._text(each, where, str(index), is_media=where == "images")
            elif isinstance(each, dict | list):
                yield each, _inside(where, str(index)), is_free

    def _check_size(self, value: dict[str, Any] | list[Any], where: str) -> None:
        if len(value) > MAX_ELEMENTS:
            raise BodyRefused(f"{where or 'the body'}: more than {MAX_ELEMENTS} elements")

    def _refuse_option(self, where: str) -> None:
        if where != "vllm_xargs":
            place = f"in {where}" if where else "at the top of the body"
            raise BodyRefused(f"{place}: options of hidrop are read from vllm_xargs", "options")

    def _text(self, text: str, where: str, key: str, is_media: bool) -> None:
        if is_media or (where or key).startswith(GRAMMARS):
            return
        self.num_chars += len(text)
        if len(text) > self.limits.max_text_chars:
            raise BodyRefused(self.limits.too_long(_inside(where, key)))

    def _parts(self, parts: list[Any], where: str) -> None:
        self.num_parts += len(parts)
        if self.num_parts > MAX_PARTS:
            raise BodyRefused(f"{where}: the body has more than {MAX_PARTS} parts")
        has_media = self.parts.check(parts, where, self.anthropic)
        if has_media and self.read_fields is not None and where.partition(".")[0] not in self.read_fields:
            raise BodyRefused(f"{where}: this route reads no media from there", "media")


def _check_integers(numbers: Sequence[int], where: str) -> None:
    if min(numbers) < -MAX_INTEGER - 1 or max(numbers) > MAX_INTEGER:
        raise BodyRefused(f"{where}: a whole number of more than 64 bits")


def _inside(where: str, key: str) -> str:
    """The dotted place of a value; it is cut, because one is written for every container."""
    return f"{where}.{key[:MAX_SHOWN_CHARS]}"[:MAX_WHERE_CHARS] if where else key[:MAX_SHOWN_CHARS]
