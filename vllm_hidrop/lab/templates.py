"""Fills in the Jinja2 templates that stand beside the code."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: Path, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None) -> str:
    """The template's text with ``values`` filled in; ``jinja2.UndefinedError`` where a name has none."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        keep_trailing_newline=True,
        autoescape=False,
        undefined=StrictUndefined,
    )
    environment.filters |= filters or {}
    return environment.get_template(template.name).render(values)
