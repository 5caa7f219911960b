"""Families whose RoPE ids, levels or layers differ, on the V2 runner: against the reference and stock vLLM."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import test_family
from tests.families.conftest import checkpoint

__all__ = ["checkpoint"]
pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("name", "method"), [("qwen3_vl", "hidrop"), ("glm4v", "fastv")])
def test_pruned_is_the_reference_and_off_is_stock(name: str, method: str, checkpoint: Callable[[str], Path]) -> None:
    test_family.test_pruned_is_the_reference_and_off_is_stock(test_family.Tiny(name, checkpoint(name)), method)
