"""Entries of a big JSON list or JSON-lines file by their place on disk. Knows nothing of what they mean."""

import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 1 << 20
MAX_ENTRY_CHARACTERS = 1 << 24
_BLANK = " \t\r\n"


class _Window:
    """The text around the current place of a UTF-8 file, and the byte offset of that place."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0
        self._undecoded = b""
        self.offset = 0

    def _more(self) -> bool:
        """Read on; false at the end of the file."""
        chunk = self._file.read(CHUNK_BYTES)
        self._undecoded += chunk
        # A chunk may end inside a character, which has up to four bytes.
        for cut in range(4 if chunk else 1):
            try:
                text = self._undecoded[: len(self._undecoded) - cut].decode()
            except UnicodeDecodeError:
                continue
            self._undecoded = self._undecoded[len(self._undecoded) - cut :]
            self._text, self._at = self._text[self._at :] + text, 0
            return bool(chunk)
        raise ValueError("not UTF-8")

    def _advance(self, end: int) -> None:
        self.offset += len(self._text[self._at : end].encode())
        self._at = end

    def next_character(self, skipped: str) -> str:
        """The first character that is not in ``skipped``, or "" at the end; the place moves to it."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in skipped:
                end += 1
            self._advance(end)
            if end < len(self._text):
                return self._text[end]
            if not self._more():
                return ""

    def step(self) -> None:
        """Move over one character."""
        self._advance(self._at + 1)

    def value(self) -> Any:
        """Read one JSON value and move over it."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > MAX_ENTRY_CHARACTERS or not self._more():
                    raise ValueError(f"not JSON: {error.msg}") from None
            else:
                self._advance(end)
                return value


def _in_list(file: IO[bytes]) -> Iterator[tuple[int, int, Any]]:
    window = _Window(file)
    if window.next_character(_BLANK + "\ufeff") != "[":
        raise ValueError("the file is not a JSON list")
    window.step()
    while (character := window.next_character(_BLANK + ",")) != "]":
        if not character:
            raise ValueError("the file ends before the list does")
        start = window.offset
        value = window.value()
        yield start, window.offset - start, value


def _in_lines(file: IO[bytes]) -> Iterator[tuple[int, int, Any]]:
    offset = 0
    for line in file:
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"not JSON: {error}") from None
            yield offset, len(line), value
        offset += len(line)


def index_entries(path: Path, check: Callable[[Any], object]) -> "array[int]":
    """Offset and length in bytes of every entry, one after the other, in one pass that holds one entry at a time.

    Args:
        path: ``.jsonl`` holds an entry per line, any other name a JSON list.
        check: raises ValueError for an entry of the wrong form.

    Raises:
        ValueError: names the file and the index of the entry.
    """
    spans: array[int] = array("Q")
    try:
        with path.open("rb") as file:
            for offset, length, value in _in_lines(file) if path.suffix == ".jsonl" else _in_list(file):
                check(value)
                spans.extend((offset, length))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: entry {len(spans) // 2}: {error}") from None
    if not spans:
        raise ValueError(f"{path} holds no entries")
    return spans


def read_entry(path: Path, offset: int, length: int) -> Any:
    """The entry at a place that :func:`index_entries` found."""
    with path.open("rb") as file:
        file.seek(offset)
        return json.loads(file.read(length))
