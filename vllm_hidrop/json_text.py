"""JSON that a person wrote, on the command line or in a file: read, or refused in one line."""

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 2**20  # of a configuration; ours are a few hundred


def parse_object(text: str, name: str) -> dict[str, Any]:
    """Read a JSON object; refusals call it ``name``. Raises ValueError: not JSON, too deeply nested, not an object."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is not JSON: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits is no JSONDecodeError
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {text if len(text) < 100 else type(value).__name__}")
    return value


def read_short_text(path: Path) -> str:
    """Read a text file. Raises ValueError: unreadable, longer than :data:`MOST_BYTES`, or not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path}: longer than {MOST_BYTES // 2**20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
