"""Check a body's fields by their types in vLLM's request models: how long, and lists of one type throughout.

vLLM's models find the same faults, but all of them: a list of a wrong type costs an error for each element, an item of
`/v1/responses` one for each of sixty models.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fastapi import FastAPI
from fastapi.routing import APIRoute
from openai.types.responses.tool import Tool
from pydantic import BaseModel, TypeAdapter, ValidationError
from vllm.entrypoints.openai.responses.protocol import ResponseInputOutputItem

from hidrop_server.errors import BodyRefused
from hidrop_server.http.body_limits import (
    MAX_ENTRIES,
    MAX_ID_CHARS,
    MAX_INSIDE,
    MAX_ITEMS,
    MAX_NAME_CHARS,
    MAX_PROMPTS,
    MAX_TOOLS,
    MAX_WORDS,
)

IDS = ("request_id", "session_id")
TEXTS = ("chat_template", "input", "instructions", "prompt", "query", "suffix", "system")  # may be as long as a prompt
MEDIA = ("audio", "images", "videos")
PROMPTS = ("prompt", "items", "query", "queries")
MANY_TOKENS = ("allowed_token_ids", "tokens")  # of these a body may have as many as it may have values
INSIDE = {"prompt": ("variables",), "response_format": ("structures", "triggers")}

ITEM_TYPES = (
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
)
"""Items that vLLM makes a chat of; it refuses others after it has checked them."""


def leaves(annotation: Any) -> Iterator[Any]:
    """The types, and the values of literals, that a union is made of, whatever it is wrapped in."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from leaves(inner[0])
    elif origin in (Union, UnionType):
        for each in inner:
            yield from leaves(each)
    elif origin is Literal:
        yield from inner
    else:
        yield annotation


def request_models(app: FastAPI) -> set[type[BaseModel]]:
    """The models of the bodies that an application's routes read."""
    bodies = (route.body_field for route in app.routes if isinstance(route, APIRoute) and route.body_field)
    found = (leaf for body in bodies for leaf in leaves(body.field_info.annotation))
    return {leaf for leaf in found if isinstance(leaf, type) and issubclass(leaf, BaseModel)}


class TypedFields:
    """Checks the fields of bodies: on every route, by what any of the models in ``requests`` says of a field."""

    def __init__(self, requests: Iterable[type[BaseModel]]) -> None:
        kinds: dict[str, set[Any]] = defaultdict(set)
        for name, field in (item for request in requests for item in request.model_fields.items()):
            for leaf in leaves(field.annotation):
                kinds[name].add(str if isinstance(leaf, str) else leaf)
                inner = leaves(get_args(leaf)[0]) if get_origin(leaf) is list else ()
                kinds[name].update((list, str if isinstance(each, str) else each) for each in inner)

        def names_of(*wanted: Any) -> set[str]:
            return {name for name, found in kinds.items() if found.intersection(wanted)}

        # Pydantic takes true for 1. logprobs is a number of one route and a boolean of another: both may come.
        self.numbers = names_of(int, float) - names_of(bool)
        self.names = names_of(str).difference(TEXTS)
        self.words = names_of((list, str)).difference(PROMPTS, MEDIA)
        self.tokens = names_of((list, int)).difference(PROMPTS)

    def check(self, body: Mapping[str, Any]) -> None:
        """Refuse faulty fields (BodyRefused); wholly other types are left to vLLM's models, at one error each."""
        for name, value in body.items():
            if isinstance(value, bool) and name in self.numbers:
                raise BodyRefused(f"{name}: must be a number, not true or false")
            if isinstance(value, str) and name in self.names:
                _check_length(value, name, MAX_ID_CHARS if name in IDS else MAX_NAME_CHARS)
            elif isinstance(value, dict):
                _check_object(value, name)
            elif isinstance(value, list):
                self._check_list(value, name)

    def _check_list(self, values: list[Any], name: str) -> None:
        is_bounded = name in self.words or name in self.tokens or name == "documents"
        if is_bounded and len(values) > MAX_WORDS and name not in MANY_TOKENS:
            raise BodyRefused(f"{name}: at most {MAX_WORDS} elements")
        if name in self.tokens and not _are(values, int):
            raise BodyRefused(f"{name}: must be a list of whole numbers")
        if name in PROMPTS:
            _check_prompts(values, name)
        for index, each in enumerate(values if name in self.words else ()):
            if not isinstance(each, str):
                raise BodyRefused(f"{name}.{index}: must be a string")
            _check_length(each, f"{name}.{index}", MAX_NAME_CHARS)
        for index, each in enumerate(values if name == "documents" else ()):
            if isinstance(each, dict) and not _are(each.values(), str, list):
                raise BodyRefused(f"documents.{index}: must be an object of texts")


def _check_object(value: dict[str, Any], name: str) -> None:
    if len(value) > MAX_ENTRIES.get(name, len(value)):
        raise BodyRefused(f"{name}: at most {MAX_ENTRIES[name]} entries")
    for inner in INSIDE.get(name, ()):
        several = value.get(inner)
        if isinstance(several, dict | list) and len(several) > MAX_INSIDE:
            raise BodyRefused(f"{name}.{inner}: at most {MAX_INSIDE} elements")


def _check_prompts(prompts: list[Any], name: str) -> None:
    """Check a list of texts, of tokens, or of lists of tokens."""
    if _are(prompts, int):
        return
    if not any(_are(prompts, kind) for kind in (str, list, dict)):
        raise BodyRefused(f"{name}: must be a text, a list of texts, a list of tokens or a list of lists of tokens")
    if len(prompts) > MAX_PROMPTS:
        raise BodyRefused(f"{name}: at most {MAX_PROMPTS} prompts")
    for index, each in enumerate(prompts):
        if isinstance(each, list) and not _are(each, int):
            raise BodyRefused(f"{name}.{index}: must be a list of whole numbers")


def _are(values: Any, *kinds: type) -> bool:
    return set(map(type, values)) <= set(kinds)


def _check_length(value: str, name: str, most: int) -> None:
    if len(value) > most:
        raise BodyRefused(f"{name}: longer than {most} characters")


class TypedItems:
    """Checks lists of at most ``most`` objects that say their own type.

    ``union`` consists of TypedDicts and models, each with a literal ``type``; ``types`` are those taken, None for all.
    """

    def __init__(self, union: Any, types: Sequence[str] | None, most: int) -> None:
        self.most = most
        members: dict[str, list[Any]] = defaultdict(list)
        for member in leaves(union):
            for name in leaves(_type_of(member)):
                if isinstance(name, str) and (types is None or name in types):
                    members[name].append(member)
        unions: dict[str, Any] = {name: reduce(or_, several) for name, several in members.items()}
        self.adapters = {name: TypeAdapter(each) for name, each in unions.items()}

    def check(self, items: list[Any], where: str) -> None:
        """Check each item, up to the first that is wrong; BodyRefused names its place."""
        if len(items) > self.most:
            raise BodyRefused(f"{where}: at most {self.most} items")
        for index, item in enumerate(items):
            self._check_item(item, f"{where}.{index}")

    def _check_item(self, item: Any, where: str) -> None:
        if not isinstance(item, dict):
            raise BodyRefused(f"{where}: must be an object")
        name = item.get("type", "message")
        adapter = self.adapters.get(name) if isinstance(name, str) else None
        if adapter is None:
            raise BodyRefused(f"{where}.type: must be one of {', '.join(self.adapters)}")
        try:
            adapter.validate_python(_with_detail(item))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(str(step) for step in first["loc"] if isinstance(step, int) or step.islower())
            says = f"{where}.{place}: {first['msg']}" if place else f"{where}: {first['msg']}"
            raise BodyRefused(says) from None


def response_items() -> TypedItems:
    """Make the check of the ``input`` of `/v1/responses`."""
    return TypedItems(ResponseInputOutputItem, ITEM_TYPES, MAX_ITEMS)


def response_tools() -> TypedItems:
    """Make the check of the ``tools`` of `/v1/responses`."""
    return TypedItems(Tool, None, MAX_TOOLS)


def _with_detail(item: dict[str, Any]) -> dict[str, Any]:
    """The item, whose images without ``detail`` get the one that vLLM gives them."""
    content = item.get("content")
    if not isinstance(content, list):
        return item
    parts = [
        {"detail": "auto", **part} if isinstance(part, dict) and part.get("type") == "input_image" else part
        for part in content
    ]
    return {**item, "content": parts}


def _type_of(member: Any) -> Any:
    """The annotation of a member's ``type``, without a TypedDict's ``Required``."""
    if isinstance(member, type) and issubclass(member, BaseModel):
        return member.model_fields["type"].annotation if "type" in member.model_fields else None
    return get_type_hints(member).get("type")
