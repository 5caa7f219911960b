"""``hidrop methods NAME``: what differs from a method's paper and code, and that it is so."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLConfig
from typer.testing import CliRunner

from vllm_hidrop.cli.app import app
from vllm_hidrop.config import make_method
from vllm_hidrop.methods import METHODS, Adaptive
from vllm_hidrop.methods.mustdrop import MustDrop
from vllm_hidrop.methods.scoring import Contribution, Signals


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


DIFFERENCES = {
    "hidrop": ("against the vision tokens only", "over the whole row"),
    "fastv": ("first fork", "ranks again for every generated token"),
    "pyramiddrop": ("numbers rows anew after every cut",),
    "visipruner": ("13B's sink and 7B's thresholds", "the exit then never comes"),
    "mustdrop": ("is 76 rows in the mean over the layers", "other sets than we in 85 to 100 % of requests"),
}
"""What a user must know of a method before its numbers are compared with the paper's."""


@pytest.mark.parametrize("name", METHODS)
def test_one_method_is_told_with_what_differs_from_its_paper_and_code(name: str) -> None:
    text = " ".join(invoke("methods", name).split())
    (row,) = json.loads(invoke("methods", name, "--json"))
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert "Differs" in text
    assert row["about"] in page
    for words in DIFFERENCES.get(name, ()):
        assert words in text
        assert words in row["about"]


def test_numbers_for_other_families_are_marked() -> None:
    rows = {row["name"]: row["other_families"] for row in json.loads(invoke("methods", "--json"))}
    assert {name for name, words in rows.items() if words is None} == {"none", "random", "uniform"}
    assert rows["mustdrop"] == "scaled, not tuned"
    assert rows["visipruner"] == "scaled, not tuned; thresholds unpublished for all but 7B"
    assert "beyond" in invoke("methods")


def test_a_plan_for_another_family_says_that_its_numbers_are_not_tuned(tmp_path: Path) -> None:
    Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--method", "visipruner", "--json"])
    assert result.exit_code == 0, result.output
    assert "hidrop: note: method 'visipruner' on Qwen2-VL: scaled, not tuned: shallow_layers is" in result.stderr
    assert json.loads(result.stdout)["provenance"] in result.stderr
    assert json.loads(invoke("plan", "7b", "--method", "visipruner", "--json"))["provenance"] is None


def test_an_unknown_method_is_one_line_that_names_the_known_ones() -> None:
    refused = CliRunner().invoke(app, ["methods", "fastw"])
    assert refused.exit_code == 2
    assert "unknown pruning method 'fastw'" in refused.stderr


def test_a_cut_that_keeps_everything_can_be_left_and_13b_has_the_thresholds_of_7b() -> None:
    """What the docstring says of VisiPruner, of the code."""
    seven, thirteen = (make_method("visipruner", f"llava-1.5-{size}b") for size in (7, 13))
    assert dataclasses.replace(thirteen, sink="first", shape=(32, 576)) == seven  # type: ignore[call-arg]
    loud = torch.full((4,), 9.0), torch.full((4,), 0.9)
    signals = Signals(9, 4, 4, torch.arange(4), Contribution(*loud))
    assert isinstance(seven, Adaptive)
    stays, event = seven.judge(signals, None)
    assert bool(stays.all())
    assert bool(event)
    memory = seven.remember(None, event=True)
    quiet = dataclasses.replace(signals, statistic=Contribution(loud[0], torch.ones(4)))
    for _ in range(2):
        assert seven.judges(12, memory)
        stays, event = seven.judge(quiet, memory)
        memory = seven.remember(memory, bool(event))
    assert not bool(stays.any())


def test_the_authors_64_tokens_of_mustdrop_are_76_rows() -> None:
    """437 tokens after merging, 39 after the first filter: by their count, after each layer, and by rows run."""
    method = make_method("mustdrop", "tok64")
    assert isinstance(method, MustDrop)
    first = method.filter_layers[0]
    assert round((first * 437 + (32 - first) * 39) / 32) == 64
    assert round(((first + 1) * 437 + (31 - first) * 39) / 32) == 76
