"""Reads JSON, JSON lines and tab-separated files into pydantic models; every mistake names file, line and field."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from vllm_hidrop.lab.validation import first_fault

MAX_FIELD_CHARACTERS = 2**31 - 1
"""A field may hold an image as base64."""
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


def read_text(path: Path) -> str:
    """A text file; ValueError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from None


def parse_json(form: type[T], text: str, path: Path, line: int | None = None) -> T:
    """JSON as a model or a type made of models; ValueError names file, line and the first field that is wrong."""
    try:
        return TypeAdapter(form).validate_json(text)
    except ValidationError as error:
        place = f"{path}, line {line}" if line else str(path)
        raise ValueError(f"{place}: {first_fault(error)}") from None


def read_json(path: Path, form: type[T]) -> T:
    """A JSON file as ``form``; ValueError when it cannot be read or has another form."""
    return parse_json(form, read_text(path), path)


def read_json_lines(path: Path, model: type[Model]) -> Iterator[Model]:
    """The objects of a JSON-lines file; ValueError where a line does not fit the model."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield parse_json(model, line, path, number)


def read_table(path: Path, model: type[Model]) -> Iterator[Model]:
    """The rows of a tab-separated file with a header; ValueError where a row does not fit the model."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    try:
        for row in reader:
            values: dict[Any, Any] = {name: value for name, value in row.items() if value is not None}
            yield model.model_validate(values)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    except ValidationError as error:
        raise ValueError(f"{path}, line {reader.line_num}: {first_fault(error)}") from None
