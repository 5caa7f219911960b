"""What a user wrote on the command line, read or refused in one line."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report a ValueError as one line on standard error, exit code 2."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"hidrop: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def parse_object(text: str, option: str) -> dict[str, Any]:
    """Read a JSON object given on the command line.

    Raises:
        ValueError: not JSON, or not an object; the message names the option.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{option} must be a JSON object, got {text}")
    return value


def parse_counts(text: str, option: str, low: int, high: int) -> tuple[int, ...]:
    """Read comma-separated whole numbers, in order, each once.

    Raises:
        ValueError: something else, or a number out of range; the message names the option.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and low <= int(part) <= high for part in parts):
        raise ValueError(f"{option} must be whole numbers from {low} to {high} like 1,2,4, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def parse_names(text: str, option: str, known: Sequence[str]) -> tuple[str, ...]:
    """Read comma-separated names, in order, each once.

    Raises:
        ValueError: an unknown name; the message names the option and the known ones.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in known:
            raise ValueError(f"{option}: unknown {part!r}; known: {', '.join(known)}")
    return tuple(dict.fromkeys(parts))
