"""Which tests ``--v2`` runs: those of ``tests/v2``, and tests of engines that run unchanged on vLLM's V2 runner.

Triton's interpreter takes some 60 ms of every step, so of a test with many cases one per method is run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ENGINE = HERE.parent / "engine"
WHOLE = ("blocks", "off_equals_stock", "tensor_parallel", "semantics")
ONE_PER_METHOD = (
    "oracle_parity",
    "adaptive_parity",
    "positions",
    "renumbered",
    "prefix",
    "image_prefix",
    "encodings",
    "continuous_batching",
    "explain",
)
INTERPRETER = {
    "test_pruned_requests_follow_a_grammar": "the kernel of grammars' bitmasks does not run in Triton's interpreter",
    "test_the_compiled_engine_decodes_renumbered_requests": "the compiler's kernels do not run in Triton's interpreter",
}
"""Tests that stay on V1 only, and why."""
OTHERWISE = {
    "test_a_seeded_prompt_in_chunks_draws_as_it_does_in_one_piece": "V2 draws by position, not by generators",
    "test_any_order_of_requests_in_a_small_pool_changes_nothing": "takes a minute; test_async.py has a small pool",
    "test_every_pair_of_methods_in_both_orders_answers_as_alone": "takes a minute; each encoding is tried once",
}
"""Tests of V1 that V2 does without; test_images_again.py too: V2 sends the pixels of a prompt that starts again."""


def chosen(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Those of all tests that run on V2."""
    files = {ENGINE / f"test_{name}.py" for name in WHOLE + ONE_PER_METHOD}
    thinned = {ENGINE / f"test_{name}.py" for name in ONE_PER_METHOD}
    seen = set()
    for item in items:
        name = getattr(item, "originalname", item.name)
        is_ours = HERE in item.path.parents
        if not is_ours and (item.path not in files or name in INTERPRETER | OTHERWISE):
            continue
        if item.get_closest_marker("slow"):
            continue
        case = (item.path, name, _method(item))
        if item.path not in thinned or case not in seen:
            seen.add(case)
            yield item


def _method(item: pytest.Item) -> str | None:
    """The method of a test's case, or the name that its file gives it."""
    params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    for value in params.values():
        if isinstance(value, dict) and "method" in value:
            return f"{value['method']} {params.get('scheme')}"
    return None
