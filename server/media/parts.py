"""Which parts a message may have: the one place that decides what a client can make this server fetch or decode."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hidrop_server.errors import BodyRefused
from hidrop_server.http.body_limits import MAX_ID_CHARS

try:
    from vllm.renderers.chat_utils import MM_PARSER_MAP
except ImportError:  # vLLM 0.33
    from vllm.renderers.chat_utils.chat_message import MM_PARSER_MAP


@dataclass(frozen=True)
class PartKind:
    """A kind of part of a message."""

    key: str  # under which its content stands
    needs: str | None = None  # modality that the server must take


OPENAI: Mapping[str, PartKind] = {
    "text": PartKind("text"),
    "input_text": PartKind("text"),
    "output_text": PartKind("text"),
    "reasoning_text": PartKind("text"),
    "summary_text": PartKind("text"),
    "refusal": PartKind("refusal"),
    "thinking": PartKind("thinking"),
    "tool_reference": PartKind("name"),
    "image_url": PartKind("image_url", "image"),
    "input_image": PartKind("image_url", "image"),
    "audio_url": PartKind("audio_url", "audio"),
    "input_audio": PartKind("input_audio", "audio"),
    "video_url": PartKind("video_url", "video"),
}
"""Not among them: ``image_pil``, which only Python can send and which vLLM would fetch from a string, embeddings, whose
flags `control.settings` refuses, and parts without a type, whose kind vLLM guesses from their keys."""
ANTHROPIC: Mapping[str, PartKind] = {
    "text": PartKind("text"),
    "image": PartKind("source", "image"),
    "tool_use": PartKind("input"),
    "tool_result": PartKind("content"),
    "tool_reference": PartKind("tool_name"),
    "thinking": PartKind("thinking"),
    "redacted_thinking": PartKind("data"),
    "tool_addition": PartKind("tool"),
    "tool_removal": PartKind("tool"),
}
SYSTEM_BLOCKS = ("text", "tool_addition", "tool_removal", "tool_reference")  # vLLM silently drops Anthropic's others
TEXT_KEYS = frozenset({"text", "refusal", "thinking"})
OTHER_DOORS = frozenset(
    {
        "audios",
        "image",
        "image_data",
        "images",
        "input_images",
        "mm_data",
        "multi_modal_data",
        "multi_modal_uuids",
        "video",
        "videos",
    }
)
"""Keys under which other servers, and vLLM from Python, take media; vLLM's routes ignore them."""
MEDIA_KEYS = OTHER_DOORS.union(MM_PARSER_MAP).difference(TEXT_KEYS, {"input_text", "output_text", "tool_reference"})
"""Keys in which vLLM looks for media whatever a part's type says, if the part has a ``uuid``."""


class MediaParts:
    """The parts that one server takes, whose model has the modalities ``takes``."""

    def __init__(self, takes: Iterable[str]) -> None:
        taken = {None, *takes}
        self.openai = {name: kind for name, kind in OPENAI.items() if kind.needs in taken}
        self.anthropic = {name: kind for name, kind in ANTHROPIC.items() if kind.needs in taken}
        self.lacking = {name: kind.needs for name, kind in OPENAI.items() if kind.needs not in taken}

    def check(self, parts: list[Any], where: str, anthropic: bool = False) -> bool:
        """Check the parts of one message; returns whether there are media among them. BodyRefused names the part."""
        kinds = self.anthropic if anthropic else self.openai
        for index, part in enumerate(parts):
            self._check_modality(part, f"{where}.{index}")
            _check_part(part, f"{where}.{index}", kinds)
        return any(kinds[part["type"]].needs for part in parts)

    def _check_modality(self, part: Any, where: str) -> None:
        name = part.get("type") if isinstance(part, dict) else None
        if isinstance(name, str) and name in self.lacking:
            raise BodyRefused(f"{where}.type: this model, as it is served here, takes no {self.lacking[name]}", "media")

    def check_keys(self, found: Mapping[str, Any], where: str, known: Iterable[str] = ()) -> None:
        """Refuse media (BodyRefused) under keys that nothing reads at the place ``where``, all but ``known``."""
        for key in MEDIA_KEYS.intersection(found).difference(known):
            if found[key] is not None:
                raise BodyRefused(f"{_at(where)}{key}: media are taken as parts of a message's content only", "media")


def _check_part(part: Any, where: str, kinds: Mapping[str, PartKind]) -> None:
    if not isinstance(part, dict):
        raise BodyRefused(f"{where}: a part must be an object with a type")
    kind = kinds.get(part["type"]) if isinstance(part.get("type"), str) else None
    if kind is None:
        raise BodyRefused(f"{where}.type: a part must be one of {', '.join(kinds)}", "media")
    others = MEDIA_KEYS.intersection(part).difference({kind.key})
    if others:
        raise BodyRefused(f"{where}: a part of this type has no {min(others)}", "media")
    _check_id(part.get("uuid"), f"{where}.uuid")
    content = part.get(kind.key)
    if kind.key in (*TEXT_KEYS, "name") and not isinstance(content, str):
        raise BodyRefused(f"{where}.{kind.key}: must be a string")
    if kind.needs in ("image", "video"):
        _check_media(part, content, f"{where}.{kind.key}")


def _check_media(part: Mapping[str, Any], content: Any, where: str) -> None:
    if part["type"] == "image":
        _check_source(content, where)
    elif content is None and part.get("uuid") is not None:
        return  # an image or a video that the server was sent before, by its id
    elif part["type"] == "input_image":
        _check_url(content, where)
    elif not isinstance(content, dict):
        raise BodyRefused(f"{where}: must be an object with a url", "media")
    else:
        _check_url(content.get("url"), f"{where}.url")


def _check_source(source: Any, where: str) -> None:
    kind = source.get("type") if isinstance(source, dict) else None
    if kind == "url":
        _check_url(source.get("url"), f"{where}.url")
    elif kind == "base64":
        _check_url(source.get("data"), f"{where}.data")
        if not isinstance(source.get("media_type", ""), str):
            raise BodyRefused(f"{where}.media_type: must be a string", "media")
    else:
        raise BodyRefused(f"{where}: must be an object of type base64 or url", "media")


def _check_url(url: Any, where: str) -> None:
    if not isinstance(url, str) or not url:
        raise BodyRefused(f"{where}: must be a string that is not empty", "media")


def _check_id(value: Any, where: str) -> None:
    if value is not None and not (isinstance(value, str) and len(value) <= MAX_ID_CHARS):
        raise BodyRefused(f"{where}: must be a string of at most {MAX_ID_CHARS} characters")


def _at(where: str) -> str:
    return f"{where}." if where else ""
