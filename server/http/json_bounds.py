"""Count what parsing a JSON body would cost, while the body arrives; nothing is parsed."""

import re

from hidrop_server.errors import BodyRefused
from hidrop_server.http.body_limits import ESCAPES_PER_VALUE, MAX_DEPTH, MAX_NUMBER_CHARS, VALUES_PER_CONTAINER

SLICE_BYTES = 1 << 16

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_SPACES = b" \t\r\n"
_NO_NUMBERS = bytes(byte if byte in b"0123456789.eE+-" else ord(" ") for byte in range(256))
_NO_BRACKETS = bytes(set(range(256)).difference(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class JsonBounds:
    """Counts values, containers, depth, escapes and digits at C's speed: a data URL costs a search for its end.

    Every count is an upper bound of what a parser meets before it finishes or gives up. Most limits follow from
    ``max_values``. ``max_text_bytes`` limits a string with letters beyond ASCII, because Python then holds each of its
    letters in up to four bytes; data URLs have none.
    """

    def __init__(self, max_values: int, max_text_bytes: int) -> None:
        self.max_values = max_values
        self.max_text_bytes = max_text_bytes
        self.num_values = 0
        self._num_containers = 0
        self._num_escapes = 0
        self._depth = 0
        self._in_string = False
        self._string_bytes = 0
        self._string_is_ascii = True
        self._half_escape = b""
        self._last = b""

    def feed(self, chunk: bytes) -> None:
        """Count a chunk of the body; BodyRefused names the limit that is passed."""
        for start in range(0, len(chunk), SLICE_BYTES):
            self._count(self._between_strings(chunk[start : start + SLICE_BYTES]))

    def _between_strings(self, chunk: bytes) -> bytes:
        """What is outside of strings, with one quotation mark for each string."""
        if self._half_escape or b"\\" in chunk:
            chunk = self._half_escape + chunk
            chunk, num_escapes = _ESCAPE.subn(b"", chunk)
            self._half_escape = b"\\" if chunk.endswith(b"\\") else b""
            chunk = chunk.removesuffix(b"\\")
            self._num_escapes += num_escapes
            self._check(self._num_escapes, ESCAPES_PER_VALUE * self.max_values, "escaped characters")
        pieces = chunk.split(b'"')
        between = b'"'.join(pieces[self._in_string :: 2])
        self._measure_open_string(pieces)
        return between

    def _measure_open_string(self, pieces: list[bytes]) -> None:
        """Measure a string that spans slices; one within a slice is short enough."""
        if self._in_string:
            self._add_to_string(pieces[0])
        self._in_string ^= len(pieces) % 2 == 0
        if len(pieces) > 1:
            self._string_bytes, self._string_is_ascii = 0, True
            if self._in_string:
                self._add_to_string(pieces[-1])

    def _add_to_string(self, piece: bytes) -> None:
        self._string_bytes += len(piece)
        self._string_is_ascii &= piece.isascii()
        if not self._string_is_ascii and self._string_bytes > self.max_text_bytes:
            raise BodyRefused(f"the body has a text of more than {self.max_text_bytes} bytes (--max-model-len)")

    def _count(self, between: bytes) -> None:
        between = between.translate(None, _SPACES)
        brackets = between.translate(None, _NO_BRACKETS)
        num_opened = brackets.count(b"[") + brackets.count(b"{")
        self._num_containers += num_opened
        self.num_values += between.count(b",") + num_opened
        self._check(self.num_values, self.max_values, "values")
        self._check(self._num_containers, self.max_values // VALUES_PER_CONTAINER, "arrays and objects")
        for bracket in brackets:
            self._depth += _STEP[bracket]
            if self._depth > MAX_DEPTH:
                raise BodyRefused(f"the body is nested deeper than {MAX_DEPTH}")
        run = self._last + between
        if max(map(len, run.translate(_NO_NUMBERS).split()), default=0) > MAX_NUMBER_CHARS:
            raise BodyRefused(f"the body has a number of more than {MAX_NUMBER_CHARS} characters")
        self._last = run[-MAX_NUMBER_CHARS:]

    def _check(self, number: int, most: int, what: str) -> None:
        if number > most:
            limit = f"--max-json-values {self.max_values}"
            raise BodyRefused(f"the body has more than {most} {what} ({limit} allows that many)")
