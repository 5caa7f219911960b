"""Texts by Jinja2 templates that stand beside the code that fills them in."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: Path, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None) -> str:
    """A Markdown text; a value that the template names and nobody gives is an error."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        keep_trailing_newline=True,
        autoescape=False,
        undefined=StrictUndefined,
    )
    environment.filters |= filters or {}
    return environment.get_template(template.name).render(values)
