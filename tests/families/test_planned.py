"""Images by their pixels, and videos, in a planned request."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

from tests.families.checkpoints import CHECKPOINTS
from tests.families.checkpoints.form import TinyCheckpoint
from vllm_hidrop.cli.costing import planned, read_model
from vllm_hidrop.cli.media import Item, parse_images
from vllm_hidrop.cli.options import Prompt
from vllm_hidrop.plan.planner import spans_of

FAMILIES = [
    name
    for name, family in CHECKPOINTS.items()
    if family.image and not (family.is_remote_code or name.startswith("qwen3_5"))
]
Checkpoint = Callable[[str], Path]


def items(model: str, *images: str, video: str | None = None, method: str = "none") -> tuple[Item, ...]:
    return planned(model, {"method": method}, Prompt(list(images), video), 32)[2].items


def runs(processor: Any, family: TinyCheckpoint, size: tuple[int, int]) -> list[tuple[int, int]]:
    """First and last place of every run of vision tokens, in a prompt that the processor made."""
    text = " ".join(processor.tokenizer.convert_ids_to_tokens(family.prompt("3i4")))
    ids = processor(text=[text], images=[Image.new("RGB", size)], return_tensors="pt")["input_ids"][0].tolist()
    places = [place for place, token in enumerate(ids) if token == processor.image_token_id]
    return [
        (place, next(end for end in range(place, len(ids)) if end + 1 not in places))
        for place in places
        if place - 1 not in places
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_of_pixels_has_the_span_of_a_request_with_it(name: str, checkpoint: Checkpoint) -> None:
    family, directory = CHECKPOINTS[name], checkpoint(name)
    processor = AutoProcessor.from_pretrained(directory)
    for size in (*family.image_sizes, (300, 200)):
        found = runs(processor, family, size)
        position = SimpleNamespace(extract_embeds_range=lambda found=found: found)
        (span,) = spans_of(SimpleNamespace(mm_position=position, modality="image"), 0, None)
        (item,) = items(str(directory), f"{size[0]}x{size[1]}")
        assert item.frames == (span.length,)
        assert item.num_separators == span.num_separators
    assert read_model(str(directory)).vision is not None


def test_tiles_that_padding_hides_are_costed(checkpoint: Checkpoint) -> None:
    directory = str(checkpoint("llava_next"))
    (item,) = items(directory, "128x70")
    assert item.num_tiles == 5
    vision = read_model(directory).vision
    assert vision is not None
    _, _, workload, costs = planned(directory, {"method": "none"}, Prompt(["128x70"]), 32)
    assert workload.items == (item,)
    assert costs.encoder_flops == vision.flops([16] * 5)


def test_an_image_of_a_fixed_size_has_the_tokens_of_any_other() -> None:
    assert items("7b", "1024x768,100", "50x50") == (Item((576,)), Item((100,)), Item((576,)))
    assert items("embedded", "1024x768") == (Item((576,)),)


@pytest.mark.parametrize("text", ["0", "x", "1024x", "0x5", "9000x10", "12.5", "1000001", "10X10", "", "5,,6"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--images must be vision tokens, 1 to 1000000, or pixels like 1024x768"):
        parse_images([text])


def test_a_video_is_one_item_of_frames(checkpoint: Checkpoint) -> None:
    directory, frame = str(checkpoint("llava_onevision")), 4
    assert items(directory, "100", video="3") == (Item((100,)), Item((frame,) * 3))
    model, _, _, costs = planned(directory, {"method": "fastv"}, Prompt([], "3"), 32)
    assert model.vision is not None
    assert costs.encoder_flops == model.vision.flops([16] * 3)
    assert costs.stages[1].kept == (frame // 2,) * 3


def test_a_video_whose_frames_are_of_any_size_needs_their_tokens(checkpoint: Checkpoint) -> None:
    directory = str(checkpoint("qwen2_vl"))
    with pytest.raises(ValueError, match=r"a frame of Qwen2-VL has tokens by its size: give --video 4xTOKENS"):
        items(directory, video="4")
    assert items(directory, video="4x20") == (Item((20,) * 4),)
    with pytest.raises(ValueError, match=r"LLaVA-1\.5 takes no videos"):
        items("7b", video="4")
    with pytest.raises(ValueError, match=r"--video must be FRAMES or FRAMESxTOKENS"):
        items(directory, video="0x3")


def test_a_checkpoint_without_a_processor_is_refused_with_the_way_out(tmp_path: Path, checkpoint: Checkpoint) -> None:
    config = (checkpoint("qwen2_vl") / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match=r"100x100 image of Qwen2-VL are not known: .* give --images vision tokens"):
        items(str(tmp_path), "100x100")
