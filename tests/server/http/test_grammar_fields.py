"""Constraints that are too large are found in the body, whatever field they are in."""

from typing import Any

import pytest

from hidrop_server.errors import BodyRefused
from hidrop_server.http.body_check import check_grammars

LARGE = "ab" * 100_000
BODIES: dict[str, dict[str, Any]] = {
    "structured_outputs": {"structured_outputs": {"structural_tag": LARGE}},
    "response_format": {"response_format": {"type": "structural_tag", "format": {"value": LARGE}}},
    "text": {"text": {"format": {"type": "json_schema", "schema": {"enum": [LARGE]}}}},
}


@pytest.mark.parametrize("name", BODIES)
def test_a_large_constraint_is_named(name: str) -> None:
    with pytest.raises(BodyRefused, match=rf"^{name} is 195 KiB large, over 64 KiB \(--max-grammar-kb\)") as refused:
        check_grammars(BODIES[name], max_kb=64)
    assert refused.value.reason == "grammar"


def test_small_constraints_and_large_prompts_pass() -> None:
    body = {"structured_outputs": {"regex": "a" * 60_000}, "prompt": LARGE, "messages": [{"content": LARGE}]}
    check_grammars(body, max_kb=64)
