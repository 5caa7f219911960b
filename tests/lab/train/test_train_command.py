"""``hidrop train`` on a tiny LLaVA: what is trained, what is written, and how a run stops and goes on."""

import csv
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner, Result

from tests.lab.train.llava_data import SCHEDULE, make_talking_llava, write_data
from vllm_hidrop.cli.app import app
from vllm_hidrop.lab.train import trainer
from vllm_hidrop.lab.train.llava_training import LlavaTraining, load_checkpoint
from vllm_hidrop.lab.train.train_config import parse_train_config
from vllm_hidrop.lab.train.trainer import StageLoop, cosine_with_warm_up, load_latest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
Settings = dict[str, Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talking_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def settings(tiny: Path, data: Path, tmp_path: Path) -> Settings:
    return {
        "model": str(tiny),
        "output": str(tmp_path / "out"),
        "data": {"format": "llava-json", "path": str(data)},
        "stage": "instruct",
        "steps": 4,
        "lr": 1e-3,
        "batch_size": 2,
        "hidrop": SCHEDULE,
        "save_every": 1,
    }


def train(settings: Settings) -> Result:
    path = Path(settings["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return CliRunner().invoke(app, ["train", str(path)])


def trained(settings: Settings) -> dict[str, Any]:
    result = train(settings)
    assert result.exit_code == 0, result.output
    return weights(Path(settings["output"]) / "model")


def weights(directory: Path) -> dict[str, Any]:
    model, report = LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state: dict[str, Any] = model.state_dict()
    return state


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def log(settings: Settings) -> list[dict[str, str]]:
    with (Path(settings["output"]) / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def last_checkpoint(settings: Settings) -> dict[str, Any]:
    state = load_latest(Path(settings["output"]) / "checkpoints")
    assert state is not None
    return state


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit, whatever the nesting."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


# --- What is trained and written ---------------------------------------------------------------


def test_align_changes_the_projector_and_nothing_else(settings: Settings, tiny: Path) -> None:
    different = changed(weights(tiny), trained(settings | {"stage": "align"}))
    assert different
    assert all("multi_modal_projector" in name for name in different)


def test_instruct_changes_projector_and_language_model_but_not_the_tower(settings: Settings, tiny: Path) -> None:
    different = changed(weights(tiny), trained(settings))
    assert any("multi_modal_projector" in name for name in different)
    assert any("language_model" in name for name in different)
    assert "lm_head.weight" in different
    assert not any("vision_tower" in name for name in different)


def test_the_finished_model_says_what_it_was_trained_with(settings: Settings, tiny: Path) -> None:
    trained(settings)
    directory = Path(settings["output"]) / "model"
    config = json.loads((directory / "config.json").read_text())
    assert config["hidrop"] == SCHEDULE
    assert config["dtype"] == "bfloat16"
    assert {path.name for path in directory.iterdir()} == {path.name for path in tiny.iterdir()}


def test_a_position_scheme_stays_with_the_model_until_another_choice_is_made(settings: Settings) -> None:
    trained(settings | {"steps": 1, "positions": "grouped"})
    grouped = Path(settings["output"]) / "model"
    for hidrop, positions, expected in [
        (None, None, "grouped"),
        (None, "persistent", None),
        (SCHEDULE, None, None),
        (SCHEDULE, "compacted", "compacted"),
        (SCHEDULE, "renumbered", "renumbered"),
    ]:
        change = {"model": str(grouped), "hidrop": hidrop, "positions": positions}
        config = parse_train_config(settings | change)
        assert load_checkpoint(config).resolved.positions == (expected or "persistent")
    entry = json.loads((grouped / "config.json").read_text())["hidrop"]
    assert entry == SCHEDULE | {"positions": "grouped"}


@pytest.mark.parametrize("selection", ["differentiable", "as_released"])
def test_the_loss_falls_on_a_repeated_tiny_data_set(settings: Settings, selection: str) -> None:
    trained(settings | {"steps": 30, "batch_size": 7, "save_every": 30, "lr": 5e-3, "selection": selection})
    losses = [float(line["loss"]) for line in log(settings)]
    assert losses[-1] < 0.3 * losses[0]


def test_accumulated_batches_make_the_step_of_one_large_batch(settings: Settings, tmp_path: Path) -> None:
    dense = settings | {"hidrop": {"method": "none"}, "steps": 1}
    trained(dense | {"batch_size": 4})
    trained(dense | {"gradient_accumulation": 2, "output": str(tmp_path / "two")})
    one, two = (log({"output": tmp_path / name})[0] for name in ("out", "two"))
    assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-5)
    assert float(one["grad_norm"]) == pytest.approx(float(two["grad_norm"]), rel=1e-3)


def test_dense_training_has_the_loss_of_the_plain_model(settings: Settings, tiny: Path) -> None:
    from vllm_hidrop.lab.train.conversations import open_source

    config = parse_train_config(settings | {"hidrop": {"method": "none"}})
    checkpoint = load_checkpoint(config)
    source = open_source(config.stages()[0].data, 0)
    batch = checkpoint.encoder.collate([source[1], source[6]])
    with torch.no_grad():
        summed = LlavaTraining.from_checkpoint(checkpoint, config)(batch)
        lengths = batch.row_starts.diff().tolist()
        padded = {
            name: pad_sequence(part.split(lengths), batch_first=True, padding_value=padding)
            for name, part, padding in (
                ("input_ids", batch.input_ids, 0),
                ("labels", batch.labels, -100),
                ("attention_mask", torch.ones_like(batch.input_ids), 0),
            )
        }
        plain = checkpoint.llava(pixel_values=batch.pixel_values, **padded).loss
    assert float(summed / (batch.targets >= 0).sum()) == pytest.approx(float(plain), rel=1e-4)


def test_the_rate_rises_to_its_peak_and_falls_as_a_cosine() -> None:
    rates = [cosine_with_warm_up(step, 2, 10) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0.0)


def test_synthetic_scenes_train_the_embedded_model(tmp_path: Path) -> None:
    settings: Settings = {
        "model": "embedded",
        "output": str(tmp_path / "out"),
        "data": {"format": "synthetic", "num_samples": 4},
        "stage": [{"stage": "align"}, {"stage": "instruct"}],
        "steps": 1,
        "batch_size": 2,
    }
    trained(settings)
    assert [(line["stage"], line["step"]) for line in log(settings)] == [("0", "1"), ("1", "1")]


def test_the_back_end_of_attention_is_named_once(settings: Settings) -> None:
    result = train(settings | TWO_STAGES)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("attention of packed rows: pytorch\n") == 1


# --- Stopping and going on -----------------------------------------------------------------------


def fail_after(monkeypatch: pytest.MonkeyPatch, num_saves: int) -> None:
    """Raise right after a checkpoint is written, as a kill would."""
    save: Callable[..., None] = trainer.save_checkpoint
    saves = []

    def save_then_fail(*arguments: Any) -> None:
        save(*arguments)
        saves.append(arguments)
        if len(saves) == num_saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_checkpoint", save_then_fail)


TWO_STAGES = {"stage": [{"stage": "align", "steps": 2}, {"stage": "instruct", "steps": 3}], "steps": None}


@pytest.mark.parametrize("num_saves", [1, 2, 4])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_saves: int
) -> None:
    whole, broken = (settings | TWO_STAGES | {"output": str(tmp_path / name)} for name in ("whole", "broken"))
    expected = trained(whole)
    with monkeypatch.context() as patch:
        fail_after(patch, num_saves)
        assert train(broken).exit_code != 0
    assert not (tmp_path / "broken/model").exists()
    assert not changed(expected, trained(broken))
    one, other = last_checkpoint(whole), last_checkpoint(broken)
    assert_same({**one, "config": 0}, {**other, "config": 0})
    timeless = [[{**line, "tokens_per_second": ""} for line in log(run)] for run in (whole, broken)]
    assert timeless[0] == timeless[1]
    assert len(timeless[0]) == 5


def test_the_newest_checkpoint_and_the_one_before_are_kept(settings: Settings) -> None:
    trained(settings)
    names = [path.name for path in (Path(settings["output"]) / "checkpoints").iterdir()]
    assert sorted(names) == ["stage00-step000000003.pt", "stage00-step000000004.pt"]


def test_a_changed_configuration_or_data_set_is_not_resumed(settings: Settings, data: Path, tmp_path: Path) -> None:
    trained(settings)
    result = train(settings | {"lr": 2e-3, "seed": 5})
    assert result.exit_code == 2
    assert "changed keys: lr, seed" in result.stderr
    kept = data.read_text()
    try:
        data.write_text(json.dumps(json.loads(kept)[:-1]))
        assert "the data has changed since the checkpoint: [7] samples then, [6] now" in train(settings).stderr
    finally:
        data.write_text(kept)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_its_batch(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlavaTraining.forward
    calls = []

    def forward_with_a_bad_third_batch(self: LlavaTraining, batch: Any) -> Any:
        calls.append(batch)
        return forward(self, batch) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(LlavaTraining, "forward", forward_with_a_bad_third_batch)
    result = train(settings)
    assert result.exit_code == 1
    assert "the loss is nan at step 3 of stage 0; its batch is in" in result.stderr
    saved = torch.load(Path(settings["output"]) / "nan_batch.pt", weights_only=True)
    assert saved["step"] == 3
    assert torch.equal(saved["batches"][0]["input_ids"], calls[2].input_ids)
    assert last_checkpoint(settings)["step"] == 2


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Callable[..., None] = torch.save
    writes = []

    def save_until_full(content: Any, file: Any) -> None:
        writes.append(content)
        if len(writes) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(content, file)

    monkeypatch.setattr(torch, "save", save_until_full)
    result = train(settings)
    assert result.exit_code == 2
    assert "hidrop: disk full while writing" in result.stderr
    checkpoints = Path(settings["output"]) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "stage00-step000000001.pt",
        "stage00-step000000002.pt",
    ]
    monkeypatch.undo()
    assert train(settings).exit_code == 0


def test_a_device_without_room_is_recognised(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    from vllm_hidrop.lab.atomic_write import whole_or_absent

    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full here")
    large = {"large": torch.zeros(100_000)}
    with pytest.raises(OSError, match="disk full"), whole_or_absent(tmp_path / "file"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    # Opened here and handed over: a writer given the path, as safetensors is, renames a file over the device.
    with (
        pytest.raises(OSError, match="disk full"),
        whole_or_absent(tmp_path / "file"),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        torch.save(large, file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "model: no checkpoint directory nowhere"),
        ({"hidrop": {"method": "hidropp"}}, "unknown pruning method 'hidropp'; known:"),
        ({"hidrop": {"method": "hidrop"}}, "this hidrop schedule is for 32 layers, the model has 8"),
        ({"data": {"format": "llava-json", "path": "none.json"}}, "cannot read none.json"),
        ({"attention": "xformers"}, "attention: xformers "),
        ({"stages": "align"}, "stages: Extra inputs are not permitted; known keys:"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(settings: Settings, change: Settings, message: str) -> None:
    result = train(settings | change)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_only_llava_15_is_trained(settings: Settings, tiny: Path, tmp_path: Path) -> None:
    """Other families run staged; the training's forward pass is LLaVA-1.5's."""
    config = json.loads((tiny / "config.json").read_text())
    config["architectures"] = ["Qwen2VLForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = train(settings | {"model": str(tmp_path)})
    assert result.exit_code == 2
    assert "cannot train architecture Qwen2VLForConditionalGeneration; known: LlavaForCond" in result.stderr


def test_an_infinite_gradient_stops_the_run_too(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = StageLoop.step

    def poisoned(self: StageLoop, batches: Any) -> Any:
        next(iter(self.trained.values())).register_hook(lambda gradient: gradient * float("inf"))
        return before(self, batches)

    monkeypatch.setattr(StageLoop, "step", poisoned)
    result = train(settings)
    assert result.exit_code == 1
    assert "the gradient is" in result.stderr
