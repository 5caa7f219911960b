"""What a body would cost is counted while it comes, whatever its pieces; no engine."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hidrop_server.errors import BodyRefused
from hidrop_server.http.body_limits import MAX_DEPTH, MAX_NUMBER_CHARS
from hidrop_server.http.json_bounds import JsonBounds

MAX_VALUES = 4096
MIB = 1 << 20

texts = st.text(alphabet='ab"\\[]{},:1 é\U0001f600', max_size=9)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


def fed(body: bytes, size: int = 1 << 16, max_values: int = MAX_VALUES) -> JsonBounds:
    bounds = JsonBounds(max_values, max_text_bytes=MIB)
    for start in range(0, len(body), size):
        bounds.feed(body[start : start + size])
    return bounds


def num_values(value: Any) -> int:
    """Of containers and of what they hold."""
    if isinstance(value, dict):
        return 1 + sum(map(num_values, value.values()))
    return 1 + sum(map(num_values, value)) if isinstance(value, list) else 1


@settings(max_examples=300, deadline=None)
@given(values, st.integers(1, 9), st.booleans())
def test_what_is_counted_is_no_less_than_what_is_there_wherever_it_is_cut(value: Any, size: int, ascii: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii).encode()
    bounds = fed(body, size)
    assert num_values(value) <= bounds.num_values + 1 <= num_values(value) + 1 + body.count(b"[]") + body.count(b"{}")


REFUSED = {
    "values": (b"[" + b"1," * MAX_VALUES * 2, "--max-json-values 4096"),
    "arrays": (b"[" + b"[]," * (MAX_VALUES // 8), "arrays and objects"),
    "objects": (b"[" + b"{}," * (MAX_VALUES // 8), "arrays and objects"),
    "fields": (b'{"a":1,' * 1 + b'"a":1,' * 2 * MAX_VALUES, "values"),
    "depth": (b"[" * (MAX_DEPTH + 1), "deeper than 64"),
    "escapes": (b'"' + b"\\n" * 5 * MAX_VALUES, "escaped characters"),
    "digits": (b"[" + b"1" * (MAX_NUMBER_CHARS + 1), "number of more than"),
    "letters of four bytes": (b'"' + b"x" * 2 * MIB + "\U0001f600".encode() + b'"', "text of more than"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("size", [1 << 16, 1000])
def test_a_limit_is_named_when_it_is_passed(name: str, size: int) -> None:
    body, says = REFUSED[name]
    with pytest.raises(BodyRefused) as caught:
        fed(body, size)
    assert says in caught.value.says


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":"' + b"[{,\\\\" * 500 + b'"}',
        b'{"a":"\\"' + b"," * 9999 + b'\\""}',
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        b"[" + b"1" * MAX_NUMBER_CHARS + b"," + b"1" * MAX_NUMBER_CHARS + b"]",
        b'"' + b"A" * 28 * MIB + b'"',
    ],
)
def test_what_stands_in_strings_is_not_counted(body: bytes) -> None:
    fed(body)


def test_a_large_picture_is_counted_at_the_speed_of_a_search() -> None:
    """30 ms for 28 MiB; seconds when every byte is looked at in Python."""
    body = b'{"url":"' + b"A" * (28 * MIB) + b'"}'
    start = time.process_time()
    fed(body)
    assert time.process_time() - start < 1.0
