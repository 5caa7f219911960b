"""Items of `/v1/responses`, each checked against the models of its own type and no others.

vLLM checks each against a union of sixty models, which takes milliseconds and hundreds of errors for a wrong one. Knows
OpenAI's models as vLLM's request has them; not routes.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from openai.types.responses.tool import Tool
from pydantic import BaseModel, TypeAdapter, ValidationError
from vllm.entrypoints.openai.responses.protocol import ResponseInputOutputItem

from hidrop_server.errors import BodyRefused

MAX_ITEMS = 1024
"""A valid one takes vLLM 0.05 to 0.3 ms."""
MAX_TOOLS = 512
ITEM_TYPES = (
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
)
"""What vLLM makes a chat of; it refuses others after it has checked them."""


class TypedItems:
    """Checks lists of objects that say their own type.

    Args:
        union: of TypedDicts and models, each with a literal ``type``.
        types: of them that are taken; None for all.
        most: items of a list.
    """

    def __init__(self, union: Any, types: Sequence[str] | None, most: int) -> None:
        self.adapters: dict[str, list[TypeAdapter[Any]]] = defaultdict(list)
        self.most = most
        for member in _members(union):
            for name in _literals(_hints(member).get("type")):
                if types is None or name in types:
                    self.adapters[name].append(TypeAdapter(member))

    def check(self, items: list[Any], where: str) -> None:
        """Check each, up to the first that is wrong.

        Raises:
            BodyRefused: too many, or one that is of no known type or not as its type must be; names its place.
        """
        if len(items) > self.most:
            raise BodyRefused(f"{where}: at most {self.most} items")
        for index, item in enumerate(items):
            self._check_item(item, f"{where}.{index}")

    def _check_item(self, item: Any, where: str) -> None:
        if not isinstance(item, dict):
            raise BodyRefused(f"{where}: must be an object")
        name = item.get("type", "message")
        adapters = self.adapters.get(name) if isinstance(name, str) else None
        if adapters is None:
            raise BodyRefused(f"{where}.type: must be one of {', '.join(self.adapters)}")
        error: ValidationError | None = None
        for adapter in adapters:
            try:
                adapter.validate_python(_with_detail(item))
            except ValidationError as caught:
                error = error or caught
            else:
                return
        assert error is not None
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"] if isinstance(step, int) or step.islower())
        raise BodyRefused(f"{where}.{place}: {first['msg']}" if place else f"{where}: {first['msg']}")


def response_items() -> TypedItems:
    """Of the ``input`` of `/v1/responses`."""
    return TypedItems(ResponseInputOutputItem, ITEM_TYPES, MAX_ITEMS)


def response_tools() -> TypedItems:
    """Of its ``tools``."""
    return TypedItems(Tool, None, MAX_TOOLS)


def _with_detail(item: dict[str, Any]) -> dict[str, Any]:
    """An image without ``detail`` has the one that vLLM gives it."""
    content = item.get("content")
    if not isinstance(content, list):
        return item
    parts = [
        {"detail": "auto", **part} if isinstance(part, dict) and part.get("type") == "input_image" else part
        for part in content
    ]
    return {**item, "content": parts}


def _members(union: Any) -> Iterator[Any]:
    origin = get_origin(union)
    if origin is Annotated:
        yield from _members(get_args(union)[0])
    elif origin is Union or type(union).__name__ == "UnionType":
        for each in get_args(union):
            yield from _members(each)
    else:
        yield union


def _hints(member: Any) -> dict[str, Any]:
    if isinstance(member, type) and issubclass(member, BaseModel):
        return {name: field.annotation for name, field in member.model_fields.items()}
    return get_type_hints(member)


def _literals(hint: Any) -> Iterator[str]:
    for each in get_args(hint):
        if isinstance(each, str):
            yield each
        else:
            yield from _literals(each)
