"""What is written: the reference's weights, configuration, tokenizer, pictures and prompts."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration
from typer.testing import CliRunner

from tests.lab.convert.originals import (
    IMAGE_TOKEN,
    NUM_ROWS,
    PAD_TOKEN,
    Checkpoint,
    Form,
    extended,
    make_original,
    padded_pixels,
    save_weights,
    tower_weights,
    wide_picture,
)
from vllm_hidrop.cli.app import app
from vllm_hidrop.lab.convert.conversion import Summary, prepare

SMALL_SHARDS = 60_000
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def convert(checkpoint: Checkpoint, destination: Path, preset: str | None = None) -> Summary:
    return prepare(checkpoint.directory, destination, preset, checkpoint.tower, SMALL_SHARDS).run(lambda _: None)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def written_weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_original(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def converted(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("converted")
    convert(checkpoint, destination)
    return destination


@torch.no_grad()
def logits(model: Any, pixels: torch.Tensor, num_tokens: int) -> torch.Tensor:
    tokens = torch.tensor([[1, 5, *[IMAGE_TOKEN] * num_tokens, 9, 33, 70]])
    return model(input_ids=tokens, pixel_values=pixels).logits


@pytest.mark.parametrize("form", ["bin", "safetensors", "single"])
def test_transformers_gives_the_logits_of_the_reference(tmp_path: Path, form: Form) -> None:
    checkpoint = make_original(tmp_path, form=form)
    assert len(convert(checkpoint, tmp_path / "out").written) > 2
    loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pixels = padded_pixels(wide_picture(64))
    expected = logits(checkpoint.reference(), pixels, checkpoint.num_tokens)
    torch.testing.assert_close(logits(loaded.eval(), pixels, checkpoint.num_tokens), expected, atol=1e-5, rtol=1e-5)


def test_every_weight_keeps_its_type_and_bits_under_the_names_of_the_hub(tmp_path: Path) -> None:
    checkpoint = make_original(tmp_path, dtype=torch.bfloat16)
    convert(checkpoint, tmp_path / "out")
    written = written_weights(tmp_path / "out")
    expected = {f"language_model.{name}": extended(value) for name, value in checkpoint.language.state_dict().items()}
    expected |= {f"vision_tower.{name}": value for name, value in tower_weights(checkpoint.vision).items()}
    for index, linear in (("0", "linear_1"), ("2", "linear_2")):
        for part in ("weight", "bias"):
            expected[f"multi_modal_projector.{linear}.{part}"] = checkpoint.projector[f"{index}.{part}"]
    buffers = {name for name in expected if name.endswith("position_ids")}
    assert written.keys() == expected.keys() - buffers
    assert all(torch.equal(value, expected[name]) for name, value in written.items())
    assert all(value.dtype == expected[name].dtype for name, value in written.items())
    config = read(tmp_path / "out" / "config.json")
    assert config["dtype"] == "bfloat16"
    index_map = read(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert index_map.keys() == written.keys()


def test_the_configuration_is_that_of_the_hub(converted: Path) -> None:
    config = read(converted / "config.json")
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["image_token_index"], config["pad_token_id"]) == (IMAGE_TOKEN, PAD_TOKEN)
    assert config["text_config"]["vocab_size"] == NUM_ROWS
    assert config["text_config"]["rms_norm_eps"] == 1e-5
    assert config["text_config"]["rope_theta"] == 10000.0
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")
    assert (config["image_seq_length"], config["image_aspect_ratio"]) == (64, "pad")
    assert "hidrop" not in config


def test_the_written_files_name_no_path_of_the_source(checkpoint: Checkpoint, converted: Path) -> None:
    parent = str(checkpoint.directory.parent)
    assert not [
        path.name for path in converted.iterdir() if path.suffix != ".safetensors" and parent in path.read_text()
    ]


def test_the_manifest_has_the_hashes_of_what_was_read_and_written(checkpoint: Checkpoint, converted: Path) -> None:
    manifest = read(converted / "hidrop_convert.json")
    assert manifest["complete"]
    shards = {path.name for path in converted.glob("*.safetensors")}
    assert manifest["written"].keys() == shards
    sources = {f"model/{path.name}": path for path in checkpoint.directory.glob("pytorch_model-*.bin")}
    sources["tower/pytorch_model.bin"] = checkpoint.tower / "pytorch_model.bin"
    records = [(manifest["sources"][name], path) for name, path in sources.items()]
    records += [(manifest["written"][name], converted / name) for name in shards]
    for record, path in records:
        assert record == {"sha256": sha256(path.read_bytes()).hexdigest(), "size_bytes": path.stat().st_size}


def test_pictures_are_padded_to_a_square_as_llava_does(converted: Path) -> None:
    processor = AutoProcessor.from_pretrained(converted)
    image = wide_picture(64)
    found = processor(images=image, text="t5 <image> t9", return_tensors="pt")
    torch.testing.assert_close(found["pixel_values"], padded_pixels(image), atol=1e-5, rtol=1e-5)
    assert found["input_ids"].tolist() == [[5, *[IMAGE_TOKEN] * 64, 9]]


def test_without_padding_the_processor_is_clips(tmp_path: Path) -> None:
    checkpoint = make_original(tmp_path, config={"image_aspect_ratio": "square"})
    convert(checkpoint, tmp_path / "out")
    found = read(tmp_path / "out" / "preprocessor_config.json")
    assert found["image_processor_type"] == "CLIPImageProcessor"
    assert "do_pad" not in found


def test_the_chat_template_is_vicuna_v1(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    parts = [{"type": "text", "text": "What?"}, {"type": "image"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = f"{bos}{SYSTEM_PROMPT} USER: <image>\nWhat? ASSISTANT: A cat.{eos}USER: Sure? ASSISTANT:"
    assert rendered == expected
    own = [{"role": "system", "content": "Be short."}, messages[2]]
    assert tokenizer.apply_chat_template(own, tokenize=False) == f"{bos}Be short. USER: Sure? "


def test_a_sentencepiece_tokenizer_keeps_its_ids(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    checkpoint = make_original(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint.directory / name).unlink()
    corpus = [f"a chat between a curious user and number {i}" for i in range(50)]
    model = checkpoint.directory / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(model), vocab_size=60, model_type="bpe", minloglevel=2
    )
    convert(checkpoint, tmp_path / "out")
    original = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")
    text = "a curious chat"
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.encode(text, add_special_tokens=False) == original.encode(text)
    assert found.convert_tokens_to_ids(["<image>", "<pad>"]) == [60, 61]
    assert read(tmp_path / "out" / "config.json")["image_token_index"] == 60


def test_a_tower_among_the_weights_is_preferred(tmp_path: Path) -> None:
    checkpoint = make_original(tmp_path, form="single")
    path = checkpoint.directory / "pytorch_model.bin"
    tuned = {f"model.vision_tower.vision_tower.{k}": v + 1 for k, v in tower_weights(checkpoint.vision).items()}
    tuned = {name: value for name, value in tuned.items() if not name.endswith("position_ids")}
    torch.save(torch.load(path) | tuned, path)
    (checkpoint.tower / "pytorch_model.bin").unlink()
    convert(checkpoint, tmp_path / "out")
    written = written_weights(tmp_path / "out")
    assert all(torch.equal(written[k.removeprefix("model.vision_tower.")], v) for k, v in tuned.items())


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector."])
def test_the_projector_may_be_a_file_of_its_own(tmp_path: Path, prefix: str) -> None:
    checkpoint = make_original(tmp_path)
    save_weights(checkpoint.directory, checkpoint.language.state_dict(), "bin")
    named = {f"{prefix}{name}": value for name, value in checkpoint.projector.items()}
    torch.save(named, checkpoint.directory / "mm_projector.bin")
    convert(checkpoint, tmp_path / "out")
    written = written_weights(tmp_path / "out")["multi_modal_projector.linear_2.bias"]
    assert torch.equal(written, checkpoint.projector["2.bias"])


def test_the_first_release_of_llava_is_known_by_its_architecture(tmp_path: Path) -> None:
    checkpoint = make_original(tmp_path, config={"model_type": "llava"})
    convert(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_tower_is_found_where_the_checkpoint_says_it_is(tmp_path: Path) -> None:
    checkpoint = make_original(tmp_path, config={"mm_vision_tower": str(tmp_path / "tower")})
    assert prepare(checkpoint.directory, tmp_path / "out").tower.directory == checkpoint.tower


@pytest.mark.parametrize(
    ("spelling", "name"), [("Tok48", "tok48"), ("TOK64", "tok64"), ("tok80", "tok80"), ("C1", "tok48-c1")]
)
def test_a_preset_is_recorded_in_the_configuration(tmp_path: Path, spelling: str, name: str) -> None:
    checkpoint = make_original(tmp_path, num_layers=32, config={"model_type": "llava_llama_exit_topk"})
    convert(checkpoint, tmp_path / "out", spelling)
    assert read(tmp_path / "out" / "config.json")["hidrop"] == {"method": "hidrop", "preset": name}


def test_the_command_warns_of_a_preset_for_plain_llava_and_prints_one_line(tmp_path: Path) -> None:
    checkpoint = make_original(tmp_path, num_layers=32)
    arguments = [str(checkpoint.directory), str(tmp_path / "out"), "--vision-tower", str(checkpoint.tower)]
    done = CliRunner().invoke(app, ["convert", *arguments, "--preset", "Tok48"])
    assert done.exit_code == 0
    assert "warning: plain LLaVA was not trained for HiDrop preset tok48" in done.stderr
    (line,) = done.stdout.splitlines()
    assert re.fullmatch(r".*: preset tok48, \d shards written, 0 verified", line)
