"""Reads JSON, JSON lines and tab-separated files; every mistake names file, line and what was expected."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MAX_FIELD_CHARACTERS = 2**31 - 1
"""A field may hold an image."""


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from None


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: expected JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise ValueError(f"{path}: expected JSON: {error}") from None


def read_json_lines(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON-lines file; every object has ``fields``.

    Raises:
        ValueError: a line is not such an object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (RecursionError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: expected a JSON object: {error}") from None
            yield number, has_fields(value, fields, f"{path}, line {number}")


def has_fields(value: Any, fields: Sequence[str], place: str) -> dict[str, Any]:
    """The value, an object that has all ``fields``.

    Raises:
        ValueError: it is not; names the place and the missing fields.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object with {', '.join(fields)}, got {type(value).__name__}")
    missing = [field for field in fields if field not in value]
    if missing:
        raise ValueError(f"{place}: expected {', '.join(fields)}; no {', '.join(missing)}")
    return value


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a tab-separated file with a header.

    Raises:
        ValueError: no such file, a missing column, or a row of another length.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    header = rows.pop(0)[1] if rows else []
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(f"{path}, line 1: expected columns {', '.join(columns)}; no {', '.join(missing)}")
    for number, row in rows:
        if row:
            if len(row) != len(header):
                raise ValueError(f"{path}, line {number}: expected {len(header)} columns, got {len(row)}")
            yield number, dict(zip(header, row, strict=True))
