"""HiDrop's checkpoints in the layout that is public: names, shards, projector, tokenizer, configuration, per size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration
from typer.testing import CliRunner

from tests.lab.convert.originals import Checkpoint, Form, make_original, padded_pixels, save_weights, wide_picture
from tests.lab.convert.test_convert import logits
from vllm_hidrop.cli.app import app
from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.lab.convert.conversion import prepare
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.methods.hidrop import HiDrop

TRAINED = {
    "model_type": "llava_llama_exit_topk",
    "architectures": ["LlavaLlamaExitTopkForCausalLM"],
    "mm_vision_tower": "./checkpoints/clip-vit-large-patch14-336",
    "tune_mm_mlp_adapter": False,
}
MOBILE = {"inject_layer": 15, "filter_layers": [16, 19, 22, 25], "keeps": [40, 10, 5, 1], "exit_layer": 28}
THIRTEEN = {"inject_layer": 10, "filter_layers": [12, 20], "keeps": [20, 5], "exit_layer": 30}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def move_projector(checkpoint: Checkpoint, suffix: str) -> None:
    """Out of the shards, as the first training stage writes it."""
    save_weights(checkpoint.directory, checkpoint.language.state_dict(), "bin" if suffix == "bin" else "safetensors")
    named = {f"model.mm_projector.{name}": value for name, value in checkpoint.projector.items()}
    path = checkpoint.directory / f"mm_projector.{suffix}"
    torch.save(named, path) if suffix == "bin" else save_file(named, path)


@pytest.mark.parametrize(
    ("name", "num_layers", "form", "projector", "schedule"),
    [
        ("llava-v1.5-3b-exit-topk-Tok64", 32, "bin", "merged", MOBILE),
        ("llava-v1.5-7b-exit-topk-Tok64", 32, "bin", "bin", None),
        ("llava-v1.5-7b-exit-topk-Tok48-T10T14T16T18", 32, "safetensors", "safetensors", None),
        ("llava-v1.5-13b-exit-topk-Tok64", 40, "safetensors", "merged", THIRTEEN),
    ],
)
def test_every_size_comes_back_as_it_was(
    tmp_path: Path, name: str, num_layers: int, form: Form, projector: str, schedule: dict[str, Any] | None
) -> None:
    checkpoint = make_original(tmp_path, name=name, num_layers=num_layers, form=form, config=TRAINED)
    if projector != "merged":
        move_projector(checkpoint, projector)
    own = [] if schedule is None else ["--schedule", json.dumps(schedule)]
    done = run(checkpoint.directory, tmp_path / "out", "--vision-tower", checkpoint.tower, *own)
    assert done.exit_code == 0, done.output
    assert not done.stderr.count("warning")
    loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    pixels = padded_pixels(wide_picture(64))
    expected = logits(checkpoint.reference(), pixels, checkpoint.num_tokens)
    torch.testing.assert_close(logits(loaded.eval(), pixels, checkpoint.num_tokens), expected, atol=1e-4, rtol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 130
    written = json.loads((tmp_path / "out" / "config.json").read_text())["hidrop"]
    method = resolve(HidropConfig.parse({}), ModelShape(num_layers, checkpoint.num_tokens), written).method
    assert isinstance(method, HiDrop)
    if schedule is None:
        assert written["preset"] == ("tok64" if "64" in name else "tok48")
    else:
        assert (method.inject_layer, list(method.keeps), method.exit_layer) == (
            schedule["inject_layer"],
            schedule["keeps"],
            schedule["exit_layer"],
        )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "llava-v1.5-3b-exit-topk",
            (),
            "MobileLLaMA-2.7B the paper names injection 15, filters 16, 19, 22, 25",
        ),
        ("llava-v1.5-3b-exit-topk", ("--preset", "tok64"), "preset tok64 is the 7B model's; for MobileLLaMA-2.7B"),
        ("llava-v1.5-13b-exit-topk-Tok64", (), "for Vicuna-13B no number of the schedule is published"),
        ("llava-v1.5-7b-exit-topk-Tok128-C1", (), "the numbers of run tok128-c1 are not published"),
        ("llava-v1.5-7b-exit-topk-Tok80-T10T14T16T18", (), "run tok80-t10t14t16t18 are not published"),
        ("mine", (), "neither a file of it nor its folder's name says which"),
        ("mine", ("--preset", "tok64", "--schedule", "{}"), "--preset and --schedule are two choices"),
        ("mine", ("--schedule", "[]"), "--schedule must be a JSON object"),
        ("mine", ("--schedule", '{"exit": 3}'), "'hidrop' has no option 'exit'"),
    ],
)
def test_what_is_unknown_is_said(tmp_path: Path, name: str, arguments: tuple[str, ...], message: str) -> None:
    checkpoint = make_original(tmp_path, name=name, config=TRAINED)
    done = run(checkpoint.directory, tmp_path / "out", "--vision-tower", checkpoint.tower, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_preset_that_the_folder_contradicts_is_warned_of(tmp_path: Path) -> None:
    name = "llava-v1.5-7b-exit-topk-Tok64"
    checkpoint = make_original(tmp_path, name=name, num_layers=32, config=TRAINED)
    conversion = prepare(checkpoint.directory, tmp_path / "out", "tok48", checkpoint.tower)
    assert conversion.warnings == ["the folder's name says tok64, not tok48"]


def test_parts_of_a_checkpoint_are_named(tmp_path: Path) -> None:
    checkpoint = make_original(tmp_path, config=TRAINED)
    adapter = checkpoint.directory / "adapter_config.json"
    adapter.write_text("{}")
    assert "holds a LoRA adapter apart from its base model; merge them" in run(checkpoint.directory, "out").stderr
    adapter.unlink()
    assert "is no checkpoint but holds some; choose one: model, tower" in run(tmp_path, "out").stderr
    index = checkpoint.directory / "pytorch_model.bin.index.json"
    index.unlink()
    assert "holds shards without their index" in run(checkpoint.directory, "out", "--preset", "tok64").stderr
    for shard in checkpoint.directory.glob("*.bin"):
        shard.unlink()
    torch.save({}, checkpoint.directory / "mm_projector.bin")
    assert "holds a projector alone, of the first training stage" in run(checkpoint.directory, "out").stderr


def test_ablations_are_refused_by_what_sets_them_apart(tmp_path: Path) -> None:
    kind = {"model_type": "llava_llama_exit_topk_cdp", "architectures": ["LlavaLlamaExitTopkCdpForCausalLM"]}
    checkpoint = make_original(tmp_path, config=kind)
    assert "an ablation of HiDrop's authors (positions without gaps)" in run(checkpoint.directory, "out").stderr


def test_weights_are_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = make_original(tmp_path, name="llava-v1.5-7b-exit-topk-Tok80", num_layers=32, config=TRAINED)
    prepare(checkpoint.directory, tmp_path / "out", None, checkpoint.tower, 60_000).run(lambda _: None)
    found = {
        name: value for file in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(file).items()
    }
    for name, value in checkpoint.language.state_dict().items():
        assert torch.equal(found[f"language_model.{name}"][: len(value)], value)
