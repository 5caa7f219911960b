"""Configuration files, LLaVA files, prompts with labels, and who gets which sample."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from tests.lab.train.llava_data import make_talking_llava, said, write_data
from vllm_hidrop.lab.train.conversations import LlavaFile, Sample, SyntheticScenes, Turn
from vllm_hidrop.lab.train.data_loader import Share, ShuffledPositions
from vllm_hidrop.lab.train.prompts import IGNORED, PromptEncoder
from vllm_hidrop.lab.train.scenes import NUM_PATCHES
from vllm_hidrop.lab.train.train_config import parse_train_config, read_train_config
from vllm_hidrop.lab.train.vocabulary import IMAGE, TOKEN_IDS, build_tokenizer
from vllm_hidrop.verify.tiny_models import IMAGE_TOKEN, TOKENS_PER_IMAGE

ROOT = Path(__file__).parents[3]
SYNTHETIC = {"format": "synthetic", "num_samples": 4}
MINIMAL: dict[str, Any] = {"model": "embedded", "output": "out", "stage": "align", "data": SYNTHETIC}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    directory = make_talking_llava(tmp_path_factory.mktemp("model"))
    return PromptEncoder(AutoProcessor.from_pretrained(directory), IMAGE_TOKEN, TOKENS_PER_IMAGE, 2048)


# --- Configuration ---------------------------------------------------------------------------


def test_stages_take_the_papers_values_unless_told_otherwise() -> None:
    values = {**MINIMAL, "stage": [{"stage": "align"}, {"stage": "instruct", "steps": 3}], "epochs": 2}
    align, instruct = parse_train_config(values).stages()
    assert (align.lr, align.warm_up, align.weight_decay, align.epochs, align.steps) == (1e-3, 0.03, 0.0, 2, None)
    assert (instruct.lr, instruct.epochs, instruct.steps) == (2e-5, None, 3)


def test_the_example_is_a_valid_configuration() -> None:
    assert [stage.stage for stage in read_train_config(ROOT / "docs/train.yaml").stages()] == ["align", "instruct"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, r"modle: Extra inputs .* known keys: .*model, output, stage"),
        ({"data": {**SYNTHETIC, "pth": "x"}}, r"data\.pth: .*known keys: format, path, images"),
        ({"stage": [{"stage": "align", "stps": 1}]}, r"stage\.0\.stps: .*known keys: data, steps"),
        ({"hidrop": {"methods": "none"}}, r"hidrop\.methods: .*known keys: method, preset, options"),
        ({"stage": "pretrain"}, r"stage\.0\.stage: Input should be 'align' or 'instruct'"),
        ({"stage": []}, "stage: "),
        ({"data": {"format": "llava-json"}}, "format llava-json needs path"),
        ({"data": None}, "data is missing"),
        ({"steps": 2, "epochs": 1}, "give steps or epochs, not both"),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_key_and_the_known_ones(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_train_config(MINIMAL | change)


# --- LLaVA files -----------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_entries_of_a_list_and_of_lines_are_found(tmp_path: Path, name: str, mark: str) -> None:
    entries = [{"conversations": said('köln 東京 "{[]}', f"t{number}")} for number in range(5)]
    lines = "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    text = lines if name.endswith("l") else json.dumps(entries, ensure_ascii=False, indent=2)
    (tmp_path / name).write_text(mark + text, encoding="utf-8")
    source = LlavaFile(tmp_path / name, None)
    assert len(source) == 5
    assert [source[number].turns[1].text for number in (4, 0)] == ["t4", "t0"]
    assert source[2].turns[0].text == 'köln 東京 "{[]}'


GOOD = {"conversations": said("t1", "t2")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not a JSON list of entries: Expected `array`"),
        ("", "is not a JSON list of entries"),
        ("[]", "holds no entries"),
        (json.dumps([GOOD])[:-1], "is not a JSON list of entries: .* truncated"),
        (json.dumps([GOOD])[:-9], "is not a JSON list of entries: "),
        (json.dumps([GOOD, {"id": 1}]), "entry 1: conversations: Field required"),
        (json.dumps([GOOD, 3]), "entry 1: Input should be an object"),
        (json.dumps([GOOD, {"conversations": said("t1", "t2")[:1]}]), "entry 1: .*must take turns"),
        (
            json.dumps([{"conversations": [{"from": "me", "value": "t1"}]}]),
            "entry 0: conversations.0.from: Input should be",
        ),
        (json.dumps([GOOD | {"image": "a.png"}]), "entry 0: 1 images but 0 <image>"),
    ],
)
def test_a_wrong_file_is_refused_with_the_index_of_the_entry(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        LlavaFile(tmp_path / "data.json", None)


def test_a_missing_file_and_a_missing_image_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*none\.json: No such file"):
        LlavaFile(tmp_path / "none.json", None)
    source = LlavaFile(write_data(tmp_path), None)
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match=r"entry 2: no such image: .*2\.png"):
        source[2]
    (tmp_path / "3.png").write_text("no pixels")
    with pytest.raises(ValueError, match=r"entry 3: not a readable image: .*3\.png"):
        source[3]


# --- Prompts ---------------------------------------------------------------------------------


def test_labels_and_queries_of_two_rounds_are_where_they_belong(encoder: PromptEncoder, tmp_path: Path) -> None:
    encoded = encoder.encode(LlavaFile(write_data(tmp_path), None)[1])
    image = [IMAGE_TOKEN] * TOKENS_PER_IMAGE
    # mark, image, t61 t61 | mark, answer, end | mark, t62 | mark, answer, end
    assert encoded.input_ids.tolist() == [50, *image, 61, 61, 51, 81, 81, 2, 50, 62, 51, 82, 2]
    ignored = [IGNORED] * (1 + TOKENS_PER_IMAGE + 3)
    assert encoded.labels.tolist() == [*ignored, 81, 81, 2, IGNORED, IGNORED, IGNORED, 82, 2]
    assert encoded.is_query.nonzero().flatten().tolist() == [1 + TOKENS_PER_IMAGE + 2, 1 + TOKENS_PER_IMAGE + 8]
    assert encoded.images.tolist() == [-1, *[0] * TOKENS_PER_IMAGE, *[-1] * 11]


def test_a_batch_is_packed_and_no_target_crosses_samples(encoder: PromptEncoder, tmp_path: Path) -> None:
    source = LlavaFile(write_data(tmp_path), None)
    batch = encoder.collate([source[6], source[1]])
    assert batch.row_starts.tolist() == [0, 6, TOKENS_PER_IMAGE + 18]
    assert len(batch.input_ids) == TOKENS_PER_IMAGE + 18
    assert batch.images[:6].unique().tolist() == [-1]
    assert batch.targets[:6].tolist() == [IGNORED, IGNORED, IGNORED, 90, 2, IGNORED]
    assert batch.targets[-2:].tolist() == [2, IGNORED]
    assert batch.rows().positions.tolist() == [*range(6), *range(TOKENS_PER_IMAGE + 12)]
    assert batch.pixel_values is not None
    assert len(batch.pixel_values) == 1


def test_a_long_sample_is_cut_but_never_inside_an_image(encoder: PromptEncoder, tmp_path: Path) -> None:
    sample = LlavaFile(write_data(tmp_path), None)[1]
    for max_length, expected, has_pixels in ((70, 70, True), (65, 65, True), (64, 1, False), (3, 1, False)):
        short = PromptEncoder(encoder.processor, IMAGE_TOKEN, TOKENS_PER_IMAGE, max_length)
        encoded = short.encode(sample)
        assert len(encoded.input_ids) == expected
        assert (encoded.pixel_values is not None) is has_pixels


def test_the_embedded_models_own_template_and_end_token_are_kept() -> None:
    tokenizer = build_tokenizer()
    processor = SimpleNamespace(
        tokenizer=tokenizer, chat_template=None, apply_chat_template=tokenizer.apply_chat_template
    )
    embedded = PromptEncoder(processor, TOKEN_IDS[IMAGE], NUM_PATCHES, 2048)
    turns = (Turn("user", "where is the star ?", 1), Turn("assistant", "top left"))
    assert embedded.pieces(turns) == [
        ("<bos><user><image>where is the star ?<assistant>", False),
        ("top left<eos>", True),
        ("", False),
    ]


def test_a_template_without_an_end_gets_the_end_token(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for c in m.content %}"
        "{% if c.type == 'text' %}{{ c.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    monkeypatch.setattr(encoder.processor, "chat_template", template)
    turns = (Turn("user", "t1"), Turn("assistant", "t4"))
    assert encoder.pieces(turns) == [("USER: t1 ASSISTANT:", False), (" t4t2", True), (" ", False)]


def test_an_image_token_typed_by_a_user_is_refused(encoder: PromptEncoder) -> None:
    sample = Sample((Turn("user", "t1 <image>"), Turn("assistant", "t4")), ())
    with pytest.raises(ValueError, match="a sample of 0 images has 64 image tokens"):
        encoder.encode(sample)


# --- Order -----------------------------------------------------------------------------------


def test_every_epoch_is_another_permutation_that_comes_again() -> None:
    scenes = SyntheticScenes(5, 1, 0)
    data, again = ShuffledPositions(scenes, (3, 0)), ShuffledPositions(scenes, (3, 0))
    samples = [data[position].turns for position in range(10)]
    assert {scenes[index].turns for index in range(5)} == set(samples[:5]) == set(samples[5:])
    assert samples[:5] != samples[5:]
    assert again[7].turns == samples[7]


def test_processes_share_a_steps_positions_without_overlap() -> None:
    shares = [Share(2, 2, process, 2) for process in range(2)]
    first, second = (list(share.positions(1, 2)) for share in shares)
    assert (first, second) == ([[8, 9], [12, 13]], [[10, 11], [14, 15]])
    assert torch.tensor([first, second]).unique().tolist() == list(range(8, 16))
