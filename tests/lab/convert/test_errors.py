"""Every mistake is one line that names what is wrong, and exit code 2; nothing is written."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.lab.convert.originals import Checkpoint, make_original
from vllm_hidrop.cli.app import app

Break = Callable[[Checkpoint], None]


def set_config(**values: object) -> Break:
    def change(checkpoint: Checkpoint) -> None:
        path = checkpoint.directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def set_tower(**values: object) -> Break:
    return lambda checkpoint: set_config(**values)(
        Checkpoint(checkpoint.tower, checkpoint.tower, None, None, {}, checkpoint.image_size)
    )


def set_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Break:
    def apply(checkpoint: Checkpoint) -> None:
        path = checkpoint.directory / "pytorch_model-00001-of-00002.bin"
        weights = torch.load(path)
        change(weights)
        torch.save(weights, path)

    return apply


def remove(name: str) -> Break:
    return lambda checkpoint: (checkpoint.directory.parent / name).unlink()


def truncate(name: str) -> Break:
    def cut(checkpoint: Checkpoint) -> None:
        path = checkpoint.directory.parent / name
        path.write_bytes(path.read_bytes()[:1000])

    return cut


def write(name: str, text: str) -> Break:
    def put(checkpoint: Checkpoint) -> None:
        path = checkpoint.directory.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    return put


SHARD = "pytorch_model-00001-of-00002.bin"
NORM = "model.norm.weight"
BREAKS: list[tuple[Break, str]] = [
    (remove("model/config.json"), "model has no config.json"),
    (write("model/config.json", "{"), "config.json is not JSON"),
    (set_config(model_type="llava", architectures=["LlavaForConditionalGeneration"]), "Hugging Face format already"),
    (
        set_config(model_type="mistral", architectures=["MistralForCausalLM"]),
        r"no original-format LLaVA-1.5 \(model_type 'mistral', architecture MistralForCausalLM\)",
    ),
    (set_config(mm_projector_type="linear"), "mm_projector_type 'linear' .* supported: mlp2x_gelu"),
    (set_config(image_aspect_ratio="anyres"), "image_aspect_ratio 'anyres' .* supported: pad, square"),
    (set_config(mm_hidden_size=1024), "the projector reads 1024 features .* the tower has 64"),
    (set_config(vocab_size=100), "the tokenizer has 128 tokens, the model 100 rows"),
    (set_config(num_hidden_layers=5), "9 weights are missing: language_model.model.layers.4.* and 5 more"),
    (set_config(intermediate_size=80), r"has shape \[96, 64\], the configuration says \[80, 64\]"),
    (set_tower(model_type="siglip"), "is a 'siglip' model, not CLIP"),
    (remove(f"model/{SHARD}"), f"names the shard {SHARD}, which is missing"),
    (remove("tower/pytorch_model.bin"), "no weights in .*tower; looked for"),
    (truncate(f"model/{SHARD}"), f"cannot read the weights in {SHARD}"),
    (truncate("tower/pytorch_model.bin"), "cannot read the weights in pytorch_model.bin"),
    (set_weights(lambda weights: weights.update(extra=torch.ones(1))), "1 weights are not LLaVA-1.5's: extra"),
    (
        set_weights(lambda weights: weights.update({name: value.to(torch.uint8) for name, value in weights.items()})),
        "quantized weights cannot be converted",
    ),
    (
        lambda checkpoint: torch.save({NORM: torch.ones(64)}, checkpoint.directory / SHARD),
        f"{NORM} is in {SHARD} and in pytorch_model-00002-of-00002.bin",
    ),
    (
        lambda checkpoint: torch.save({}, checkpoint.directory / SHARD),
        "22 weights are missing: multi_modal_projector.linear_1.bias, .* and 18 more",
    ),
    (lambda checkpoint: torch.save([1], checkpoint.directory / SHARD), f"{SHARD} does not hold tensors by name"),
    (set_config(mm_vision_select_layer=-1), "mm_vision_select_layer -1 .* supported: -2"),
    (set_config(mm_use_im_start_end=True), "mm_use_im_start_end True"),
    (set_config(tie_word_embeddings=True), "tie_word_embeddings True"),
    (remove("model/tokenizer.json"), "no tokenizer in .*; looked for tokenizer.json, tokenizer.model"),
    (write("model/tokenizer.json", "{}"), "cannot read the tokenizer in"),
    (write("out/notes.txt", "mine"), "out is not empty and no conversion of ours"),
    (write("out/hidrop_convert.json", "{}"), "hidrop_convert.json is damaged"),
    (write("out", "mine"), "destination .*out: Not a directory"),
]


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(("spoil", "message"), BREAKS)
def test_a_source_that_cannot_be_converted_is_one_line(tmp_path: Path, spoil: Break, message: str) -> None:
    checkpoint = make_original(tmp_path)
    spoil(checkpoint)
    line = run(checkpoint.directory, tmp_path / "out", "--vision-tower", checkpoint.tower)
    assert re.search(message, line), line
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    assert "no such directory: " in run(tmp_path / "nowhere", tmp_path / "out")


def test_without_a_tower_the_flag_is_named(tmp_path: Path) -> None:
    line = run(make_original(tmp_path).directory, tmp_path / "out")
    assert "'openai/clip-vit-large-patch14-336' is no directory here" in line
    assert "--vision-tower" in line


def test_a_missing_tower_is_named(tmp_path: Path) -> None:
    line = run(make_original(tmp_path).directory, tmp_path / "out", "--vision-tower", tmp_path / "nowhere")
    assert "--vision-tower: no such directory" in line


@pytest.mark.parametrize(
    ("kind", "preset", "message"),
    [
        ("llava_llama_exit_topk", [], "name it with --preset: tok48, tok64, tok80, tok48-c1, none"),
        ("llava_llama", ["--preset", "tok99"], "unknown preset 'tok99'; known: tok48, tok64, tok80, tok48-c1, none"),
        ("llava_llama_exit_topk", ["--preset", "Tok48"], "this hidrop schedule is for 32 layers, the model has 4"),
    ],
)
def test_a_preset_that_is_wrong_or_wanting_is_explained(
    tmp_path: Path, kind: str, preset: list[str], message: str
) -> None:
    checkpoint = make_original(tmp_path, config={"model_type": kind})
    assert message in run(checkpoint.directory, tmp_path / "out", "--vision-tower", checkpoint.tower, *preset)


def test_a_destination_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    checkpoint = make_original(tmp_path)
    (tmp_path / "file").write_text("mine")
    arguments = [checkpoint.directory, tmp_path / "file" / "out", "--vision-tower", checkpoint.tower]
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        f"hidrop: destination {tmp_path / 'file' / 'out'}: {tmp_path / 'file'}: Not a directory"
    )
