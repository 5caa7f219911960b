"""``hidrop calibrate``, as a user types it."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.lab.calibrate.tiny_qwen import NUM_LAYERS as QWEN_LAYERS
from tests.lab.calibrate.tiny_qwen import make_qwen
from vllm_hidrop.cli.app import app
from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.embedded import MODEL_DIR
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.methods.visipruner import VisiPruner
from vllm_hidrop.verify.tiny_models import NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

QUICK = ("--samples", "4", "--data", "synthetic")


def calibrate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)], env={"COLUMNS": "120"})


def least_budget(model: str | Path, *arguments: str) -> str:
    """The smallest budget that the refusal of budget 0 offers."""
    result = calibrate(model, *QUICK, *arguments, "--budget", "0")
    found = re.search(r"the least this schedule reaches is ([\d.]+)\n", result.stderr)
    assert found, result.output
    return found[1]


def test_the_embedded_model_gives_the_same_bytes_twice_and_a_schedule_that_resolves(tmp_path: Path) -> None:
    outputs, budget = [], least_budget("embedded")
    for run in ("one", "two"):
        folder = tmp_path / run
        folder.mkdir()
        result = calibrate(
            "embedded", *QUICK, "--budget", budget, "--json", folder / "a.json", "--png", folder / "a.png"
        )
        assert result.exit_code == 0, result.output
        outputs.append([path.read_bytes() for path in sorted(folder.iterdir())] + [result.stdout.encode()])
    assert outputs[0] == outputs[1]
    assert sorted(path.name for path in folder.iterdir()) == ["a.curves.json", "a.json", "a.png"]
    config = json.loads((folder / "a.json").read_text())
    assert set(config) == {"method", "options", "note", "force"}
    own = json.loads((MODEL_DIR / "config.json").read_text())
    shape = ModelShape(own["text_config"]["num_hidden_layers"], own["image_seq_length"])
    resolved = resolve(HidropConfig.parse(config), shape, own["hidrop"])
    assert resolved.schedule.mean_kept(shape.tokens_per_image) == pytest.approx(float(budget), abs=2)
    assert "trained for another schedule" in result.stdout
    curves = json.loads((folder / "a.curves.json").read_text())
    assert curves["num_samples"] == 4
    assert {len(curves[name]) for name in ("vision_intra", "text_intra", "cross", "agreement", "accuracy")} == {
        shape.num_layers
    }


def test_another_seed_measures_other_scenes(tmp_path: Path) -> None:
    for seed in ("0", "1"):
        calibrate("embedded", *QUICK, "--budget", "0", "--seed", seed, "--json", tmp_path / f"{seed}.json")
    assert (tmp_path / "0.curves.json").read_bytes() != (tmp_path / "1.curves.json").read_bytes()


def test_a_budget_that_cannot_be_met_is_one_line_and_keeps_the_curves(tmp_path: Path) -> None:
    result = calibrate("embedded", *QUICK, "--budget", "0", "--json", tmp_path / "a.json", "--png", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "hidrop: budget 0 cannot be met: layers" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.curves.json", "a.png"]


def test_a_llava_without_a_schedule_of_its_own_needs_no_force(tmp_path: Path) -> None:
    model = make_llava(tmp_path / "model", "mistral")
    result = calibrate(model, *QUICK, "--budget", least_budget(model), "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "a.json").read_text())
    assert set(config) == {"method", "options", "note"}
    assert resolve(HidropConfig.parse(config), ModelShape(NUM_LAYERS, TOKENS_PER_IMAGE)).schedule


def test_qwen_gets_shares_of_an_image(tmp_path: Path) -> None:
    model = make_qwen(tmp_path / "model")
    budget = least_budget(model, "--windows", "1")
    result = calibrate(model, *QUICK, "--budget", budget, "--windows", "1", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    options = json.loads((tmp_path / "a.json").read_text())["options"]
    assert options["shape"] == [QWEN_LAYERS, 36]
    assert all(keep.endswith("/36") for keep in options["keeps"])


def test_visipruners_numbers_for_a_tower_of_one_size_are_counts(tmp_path: Path) -> None:
    for flags in ((), ("--fixed-layers",)):
        file = tmp_path / "a.json"
        result = calibrate("embedded", *QUICK, "--method", "visipruner", *flags, "--keep", "0.05", "--json", file)
        assert result.exit_code == 0, result.output
        config = json.loads(file.read_text())
        resolved = resolve(HidropConfig.parse(config), ModelShape(12, 576))
        assert isinstance(resolved.method, VisiPruner)
        assert resolved.method.sink == "first"
        assert "not published" in config["note"]
        assert set(json.loads((tmp_path / "a.curves.json").read_text())) >= {"quiet", "cut", "agreement"}
    assert config["options"]["keep"] == 28
    assert "these thresholds" in result.stdout


def test_visipruners_mistakes_are_named(tmp_path: Path) -> None:
    for arguments, message in (
        (("--keep", "many"), 'keep must be "all", a count'),
        (("--png", tmp_path / "a.png"), "--png draws HiDrop's curves"),
    ):
        result = calibrate("embedded", *QUICK, "--method", "visipruner", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--windows", "2,x"), "--windows must be whole numbers from 1 to 1024 like 1,2,4, got '2,x'"),
        (("--windows", "0"), "--windows must be whole numbers"),
        (("--windows", "12"), "a window must be in [1, 11] for 12 layers, got 12"),
        (("--data", "nowhere.json"), "no such data file: nowhere.json"),
        (("--json", "/dev/null/a.json"), "/dev/null: Not a directory"),
        (("--device", "abacus"), "cannot use device 'abacus'"),
        (("--budget", "570"), "budget 570 cannot be used up"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = calibrate("embedded", *QUICK, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_picture_without_matplotlib_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = calibrate("embedded", *QUICK, "--png", "a.png")
    assert result.exit_code == 2
    assert '--png needs matplotlib: pip install "vllm-hidrop[train]"' in result.stderr
