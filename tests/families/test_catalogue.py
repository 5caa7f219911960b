"""``hidrop families``: what it says was run is what the tests run, and what it leaves out is left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from tests.families.checkpoints import CHECKPOINTS
from vllm_hidrop.cli.app import app
from vllm_hidrop.models.families import FAMILIES

ROOT = Path(__file__).parents[2]
LLAVA = "LlavaForConditionalGeneration"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["families", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def configuration(checkpoint: Callable[[str], Path], name: str) -> Any:
    return AutoConfig.from_pretrained(checkpoint(name), trust_remote_code=CHECKPOINTS[name].is_remote_code)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["architecture"]: row for row in json.loads(invoke("--json"))}


def test_every_family_is_listed(rows: dict[str, dict[str, Any]]) -> None:
    assert list(rows) == list(FAMILIES)
    text = " ".join(invoke().split())
    assert all(row["title"].split()[0] in text for row in rows.values())
    assert rows[LLAVA]["run"]["real weights, CPU"] == ["llama + clip"]
    assert all(not row["run"]["real weights, CPU"] for name, row in rows.items() if name != LLAVA)


def test_the_pairs_that_were_run_are_those_of_the_tests_checkpoints(checkpoint: Callable[[str], Path]) -> None:
    found: dict[str, set[tuple[str, str]]] = {}
    for name in CHECKPOINTS:
        config = configuration(checkpoint, name)
        pair = (
            (getattr(config, "llm_config", None) or config.get_text_config()).model_type,
            config.vision_config.model_type,
        )
        found.setdefault(config.architectures[0], set()).add(pair)
    for stock, family in FAMILIES.items():
        if stock != LLAVA:
            assert set(family.ran) == found.get(stock, set()), stock


def test_llavas_pairs_are_named_in_tests_that_run_them() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "engine").glob("test_*.py")]
    for text, tower in FAMILIES[LLAVA].ran:
        assert any(f'"{text}-{tower.split("_", maxsplit=1)[0]}"' in source for source in sources), (text, tower)


def test_what_is_left_out_of_a_method_is_what_cannot_be_reduced(
    rows: dict[str, dict[str, Any]], checkpoint: Callable[[str], Path]
) -> None:
    assert rows[LLAVA]["left_out"] == {"mustdrop": {"options": "merge_threshold, key_rate", "towers": ["siglip"]}}
    for name in CHECKPOINTS:
        config = configuration(checkpoint, name)
        family = FAMILIES.get(config.architectures[0])
        if family is not None and not family.reducible_towers:
            assert family.no_reduction(config)
            assert rows[family.stock]["left_out"]["mustdrop"]["towers"] == rows[family.stock]["towers"]
        elif family is not None:
            assert rows[family.stock]["left_out"]["mustdrop"]["towers"] == ["siglip"]
    assert (
        "mustdrop in the tower (merge_threshold, key_rate) is left out of: LLaVA-1.5 with siglip, LLaVA-NeXT with"
        in (" ".join(invoke().split()))
    )
