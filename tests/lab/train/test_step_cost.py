"""`hidrop bench train` on a tiny shape: real steps of both kinds."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_hidrop.bench.shapes import SHAPES, random_model
from vllm_hidrop.cli.app import app
from vllm_hidrop.config import make_method
from vllm_hidrop.lab.train.step_cost import TrainingStep
from vllm_hidrop.methods.none import NoPruning


def test_a_step_with_a_schedule_holds_less_for_the_backward_pass(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    arguments = ["bench", "train", "--shape", "tiny", "--batch", "1", "--runs", "1", "--json", str(file)]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["seconds"] > 0
    assert found["speedup"] == found["dense_seconds"] / found["seconds"]
    assert found["activation_bytes"] < 0.6 * found["dense_activation_bytes"]
    assert 2 < found["ideal_speedup"] < 9


def test_both_forwards_train_the_same_weights() -> None:
    step = TrainingStep(random_model(SHAPES["tiny"], "float32"), 1, 40)
    frozen = [name for name, parameter in step.model.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all("vision_tower" in name for name in frozen)
    weight = step.model.model.language_model.layers[0].mlp.up_proj.weight
    for method in (NoPruning(), make_method("hidrop", "tok64", {"scale": True})):
        before = weight.detach().clone()
        step.run(step.module_of(method))
        assert not weight.equal(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "unknown shape"),
        (["--method", "x"], "unknown"),
        (["--method", "visipruner"], "decides while a prompt runs"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    ended = CliRunner().invoke(app, ["bench", "train", *arguments])
    assert ended.exit_code == 2
    assert message in ended.stderr
