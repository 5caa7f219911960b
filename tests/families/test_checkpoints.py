"""Every family's tiny checkpoint means the same to stock vLLM and to Hugging Face; else its other tests are void."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import SamplingParams

from tests.engine.harness import engine, picture
from tests.families.checkpoints import CHECKPOINTS
from tests.families.checkpoints.form import TinyCheckpoint

pytestmark = [
    pytest.mark.engine,
    # transformers' processor of GLM-4V turns a list of tensors into an array
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

NUM_TOKENS = 4


@dataclass(frozen=True)
class Question:
    """A prompt with the sizes of its images, by their numbers in the family's table, or with the family's video."""

    layout: str
    images: tuple[int, ...] = ()
    has_video: bool = False

    def media(self, family: TinyCheckpoint) -> dict[str, list[Any]]:
        """vLLM's ``multi_modal_data``."""
        if self.has_video:
            assert family.video_shape is not None
            return {"video": [(family.video_shape.frames(1), family.video_shape.metadata())]}
        return {"image": [picture(i, family.image_sizes[i]) for i in self.images]}


@dataclass(frozen=True)
class Answer:
    """Prompt with its placeholders expanded, greedy tokens, and the logits [vocabulary] of the first."""

    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor


def questions(family: TinyCheckpoint) -> Iterator[Question]:
    """One image, two of different sizes, one video, as far as the family takes them."""
    if family.image:
        yield Question("4i5", (0,))
        yield Question("2i3i4", (1, 0))
    if family.video:
        yield Question("3v5", has_video=True)


def ask_vllm(directory: Path, family: TinyCheckpoint, asked: list[Question]) -> list[Answer]:
    """By a stock engine."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=-1, detokenize=False)
    prompts = [{"prompt_token_ids": family.prompt(q.layout), "multi_modal_data": q.media(family)} for q in asked]
    limits = {"image": 2 if family.image else 0, "video": 1 if family.video else 0}
    settings: dict[str, Any] = {
        "dtype": family.dtype,
        "limit_mm_per_prompt": limits,
        "skip_mm_profiling": True,
        "trust_remote_code": family.is_remote_code,
    }
    with engine(directory, None, **settings) as running:
        outputs = running.llm.generate(prompts, params, use_tqdm=False)
    return [_vllm_answer(output) for output in outputs]


def _vllm_answer(output: Any) -> Answer:
    completion = output.outputs[0]
    first = completion.logprobs[0]
    logits = torch.tensor([first[token].logprob for token in range(len(first))])
    return Answer(list(output.prompt_token_ids), list(completion.token_ids), logits)


def ask_transformers(
    directory: Path, family: TinyCheckpoint, asked: list[Question], dtype: torch.dtype
) -> list[Answer]:
    """From the prompt as text, by Hugging Face's own processor and model."""
    processor = AutoProcessor.from_pretrained(family.reference(directory))
    if family.is_remote_code:
        processor.image_processor = family.image_processor(directory)
    model, loaded = AutoModelForImageTextToText.from_pretrained(
        family.reference(directory), dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loaded.values()), loaded
    model.generation_config.eos_token_id = None  # it is a token as any other, as with vLLM's ``ignore_eos``
    answers = []
    for question in asked:
        text = " ".join(processor.tokenizer.convert_ids_to_tokens(family.prompt(question.layout)))
        inputs = processor(text=[text], return_tensors="pt", **_hugging_face_media(question.media(family)))
        output = model.generate(
            **inputs.to(model.dtype),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt = inputs["input_ids"][0].tolist()
        answers.append(Answer(prompt, output.sequences[0].tolist()[len(prompt) :], output.logits[0][0].float()))
    return answers


def _hugging_face_media(media: dict[str, list[Any]]) -> dict[str, Any]:
    if "image" in media:
        return {"images": media["image"]}
    frames, metadata = media["video"][0]
    known = {name: value for name, value in metadata.items() if name != "do_sample_frames"}
    return {"videos": [frames], "video_metadata": [known], "do_sample_frames": False}


def with_image_tokens(family: TinyCheckpoint, prompt: list[int]) -> list[int]:
    """The expanded prompt as Hugging Face has it, InternVL's frames with the tokens of an image."""
    return [family.as_hugging_face.get(token, token) for token in prompt]


def _rms(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())


@pytest.mark.parametrize("name", [name for name, family in CHECKPOINTS.items() if family.dtype == "float32"])
def test_stock_vllm_answers_as_hugging_face_does(name: str, checkpoint: Callable[[str], Path]) -> None:
    family, directory = CHECKPOINTS[name], checkpoint(name)
    asked = list(questions(family))
    theirs = ask_transformers(directory, family, asked, torch.float32)
    ours = ask_vllm(directory, family, asked)
    for our, their in zip(ours, theirs, strict=True):
        assert with_image_tokens(family, our.prompt) == with_image_tokens(family, their.prompt)
        print(name, len(our.prompt), "tokens, logits differ by", float((our.logits - their.logits).abs().max()))
        assert torch.allclose(our.logits, their.logits, rtol=0, atol=family.tolerance)
        assert our.tokens == their.tokens
    assert len({len(answer.prompt) for answer in ours}) == len(ours)


@pytest.mark.parametrize("name", [name for name, family in CHECKPOINTS.items() if family.dtype == "bfloat16"])
def test_stock_vllm_in_bfloat16_is_near_hugging_face_in_float32(name: str, checkpoint: Callable[[str], Path]) -> None:
    family, directory = CHECKPOINTS[name], checkpoint(name)
    asked = list(questions(family))
    exact = ask_transformers(directory, family, asked, torch.float32)
    theirs = ask_transformers(directory, family, asked, torch.bfloat16)
    ours = ask_vllm(directory, family, asked)
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert our.prompt == true.prompt
        scale = float(true.logits.std())
        error, usual = _rms(our.logits - true.logits) / scale, _rms(their.logits - true.logits) / scale
        print(
            name, len(our.prompt), f"tokens, logits differ from float32 by {error:.3f}, Hugging Face's by {usual:.3f}"
        )
        assert error < family.tolerance
        assert usual < family.tolerance
