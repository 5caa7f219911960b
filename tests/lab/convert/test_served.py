"""The real engine serves a converted checkpoint: dense as the reference, pruned as the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm import SamplingParams

from tests.engine.harness import Engine, engine
from tests.lab.convert.originals import IMAGE_TOKEN, Checkpoint, make_original, padded_pixels, wide_picture
from tests.oracles.masked import Oracle
from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.lab.convert.conversion import prepare
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.verify.reference.stages import OracleStage

pytestmark = pytest.mark.engine

NUM_TOKENS = 6
BOS = 1
PROMPT = [1, 5, 88, IMAGE_TOKEN, 9, 33, 70, 41]


def convert(checkpoint: Checkpoint, destination: Path, preset: str) -> Path:
    prepare(checkpoint.directory, destination, preset, checkpoint.tower).run(lambda _: None)
    return destination


def full_prompt(num_image_tokens: int) -> list[int]:
    return [each for token in PROMPT for each in [token] * (num_image_tokens if token == IMAGE_TOKEN else 1)]


def served(running: Engine, image: Image.Image) -> Any:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompt: Any = {"prompt_token_ids": PROMPT, "multi_modal_data": {"image": [image]}}
    return running.llm.generate([prompt], params, use_tqdm=False)[0]


@torch.no_grad()
def greedy(model: Any, tokens: list[int], pixels: torch.Tensor) -> list[int]:
    generated: list[int] = []
    for _ in range(NUM_TOKENS):
        logits = model(input_ids=torch.tensor([tokens + generated]), pixel_values=pixels).logits
        generated.append(int(logits[0, -1].argmax()))
    return generated


def test_plain_llava_is_served_with_the_tokens_of_the_reference(tmp_path: Path) -> None:
    checkpoint = make_original(tmp_path, form="safetensors")
    image = wide_picture(64)
    expected = greedy(checkpoint.reference(), full_prompt(checkpoint.num_tokens), padded_pixels(image))
    with engine(convert(checkpoint, tmp_path / "out", "none"), None) as running:
        assert list(served(running, image).outputs[0].token_ids) == expected
        parts = [{"type": "text", "text": "t9 t70"}, {"type": "image_pil", "image_pil": image}]
        chat: Any = [{"role": "user", "content": parts}]
        asked = list(running.llm.chat(chat, use_tqdm=False)[0].prompt_token_ids or [])
    assert [asked.count(BOS), asked[0]] == [1, BOS]
    assert asked.count(IMAGE_TOKEN) == checkpoint.num_tokens
    assert asked.index(IMAGE_TOKEN) < asked.index(9) < asked.index(70)
    blank = greedy(
        checkpoint.reference(), full_prompt(checkpoint.num_tokens), padded_pixels(Image.new("RGB", (64, 64)))
    )
    assert expected != blank, "the picture makes no difference"


def test_a_hidrop_checkpoint_is_served_with_its_preset_unasked(tmp_path: Path) -> None:
    kind = {"model_type": "llava_llama_exit_topk", "architectures": ["LlavaLlamaExitTopkForCausalLM"]}
    checkpoint = make_original(tmp_path, num_layers=32, image_size=192, config=kind)
    image = wide_picture(192)
    shape = ModelShape(32, 576)
    schedule = resolve(HidropConfig.parse({"method": "hidrop", "preset": "tok48"}), shape).schedule
    stages = [
        OracleStage(stage.first_layer, (keep,)) for stage, keep in zip(schedule.stages, schedule.kept(576), strict=True)
    ]
    oracle = Oracle(checkpoint.reference())
    expected = oracle.generate(full_prompt(576), padded_pixels(image), stages, "attention_next", NUM_TOKENS)
    with engine(convert(checkpoint, tmp_path / "out", "Tok48"), {}) as running:
        output = served(running, image)
    assert list(output.outputs[0].token_ids) == expected.token_ids
    report = output.kv_transfer_params["hidrop"]
    assert report["mode"] not in ("off", "text")
    assert report["kv_blocks"] < report["kv_blocks_dense"]
