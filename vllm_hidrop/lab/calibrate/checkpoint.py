"""A vision-language checkpoint as Hugging Face runs it: prompts, rows, answers.

Axes: N rows of one prompt with its answer, V vision rows. One prompt at a time, so nothing is padded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vllm_hidrop.lab.calibrate.attention import register
from vllm_hidrop.models.families import family_of
from vllm_hidrop.models.family import Family

NOT_CALIBRATED = {
    "InternVLChatModel": "the released form's modules are its own code's; take the Hugging Face form",
    "LlavaNextVideoForConditionalGeneration": "it takes videos alone, and the curves are measured on images",
}
"""Architectures that run staged and that the curves are not defined for, and why."""
LLAVA_PROMPT = "USER: {image}\n{question} ASSISTANT:"
"""LLaVA-1.5's form, for a checkpoint without a chat template."""


@dataclass(frozen=True)
class Rows:
    """Which rows of [prompt, answer] are what; all indices, ``vision`` [V] among them, ascend.

    Vision is everything from the first to the last token of the image, as when it is served: row breaks and the text
    between tiles are among it.
    """

    vision: Tensor
    num_prompt: int
    num_rows: int

    @property
    def last_prompt(self) -> int:
        """The row that the first answer token is predicted from."""
        return self.num_prompt - 1

    @property
    def num_answer(self) -> int:
        """Answer tokens, each predicted from the row before it."""
        return self.num_rows - self.num_prompt

    @property
    def text(self) -> Tensor:
        """Indices of the rows that are not vision, those of the answer included."""
        is_text = torch.ones(self.num_rows, dtype=torch.bool, device=self.vision.device)
        is_text[self.vision] = False
        return is_text.nonzero().flatten()

    @property
    def prompt_text(self) -> Tensor:
        """Indices of the prompt's text rows."""
        text = self.text
        return text[text < self.num_prompt]

    @property
    def instruction(self) -> Tensor:
        """Indices of the prompt's rows behind the image."""
        text = self.prompt_text
        return text[text > self.vision[-1]]


@dataclass(frozen=True)
class Encoded:
    """Model inputs of one prompt with its answer; ``has_answer`` is false where the model wrote the answer itself."""

    inputs: dict[str, Tensor]
    rows: Rows
    has_answer: bool

    @property
    def answer(self) -> Tensor:
        """Token ids of the answer."""
        return self.inputs["input_ids"][0, self.rows.num_prompt :]


class Checkpoint:
    """A loaded model and its processor; float32 on a CPU, the checkpoint's own type elsewhere."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        if source.startswith((".", "/", "~")) and not Path(source).is_dir():
            raise ValueError(f"no such model directory: {source}")
        self.device = _device(device)
        with _load_errors(source):
            self.config: Any = AutoConfig.from_pretrained(source)
        self.family = family_to_calibrate(self.config)
        dtype = torch.float32 if self.device.type == "cpu" else "auto"
        with _load_errors(source):
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
            model.get_decoder().set_attn_implementation(register())
            self.processor: Any = AutoProcessor.from_pretrained(source)
        self.model: Any = model.eval().to(self.device)
        self.llm: Any = self.model.get_decoder()
        self.num_layers = len(self.llm.layers)
        if without := [i for i, layer in enumerate(self.llm.layers) if not hasattr(layer, "self_attn")]:
            raise ValueError(f"cannot calibrate {self.family.title}: its layers {without} have no attention to measure")

    def prompt(self, question: str) -> str:
        """The chat prompt of a question about one image, up to where the answer begins."""
        if getattr(self.processor, "chat_template", None) or getattr(self.processor.tokenizer, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        return LLAVA_PROMPT.format(image=self.processor.image_token, question=question)

    def encode(self, image: Image.Image, question: str, answer: str | None, max_answer_tokens: int) -> Encoded:
        """Tokenise a prompt and its answer (None: the model's greedy one); ValueError: no vision token in the text."""
        prompt = self.prompt(question)
        found = self.processor(images=[image], text=[prompt], return_tensors="pt")
        inputs = {key: value.to(self.device) for key, value in found.items() if isinstance(value, Tensor)}
        ids = inputs["input_ids"]
        if "image_grid_thw" in inputs:  # M-RoPE needs to be told which tokens are of an image
            inputs["mm_token_type_ids"] = (ids == self.config.image_token_id).int()
        places = (ids[0] == self.config.image_token_id).nonzero().flatten()
        if not len(places):
            raise ValueError("the model's chat template leaves no image token in the prompt")
        vision = torch.arange(int(places[0]), int(places[-1]) + 1, device=self.device)
        tail = self._greedy(inputs, max_answer_tokens) if answer is None else self._answer_ids(prompt, answer)
        tail = tail[:max_answer_tokens].to(self.device)
        rows = Rows(vision, ids.shape[1], ids.shape[1] + len(tail))
        return Encoded(_extended(inputs, tail), rows, answer is not None)

    def _answer_ids(self, prompt: str, answer: str) -> Tensor:
        """Token ids of an answer as they follow its prompt, the end-of-sequence token included."""
        tokenizer = self.processor.tokenizer
        space = "" if prompt[-1:].isspace() else " "
        num_prompt = len(tokenizer(prompt).input_ids)
        ids = tokenizer(f"{prompt}{space}{answer}{tokenizer.eos_token or ''}").input_ids
        return torch.tensor(ids[num_prompt:])

    @torch.no_grad()
    def _greedy(self, inputs: dict[str, Tensor], max_answer_tokens: int) -> Tensor:
        image_token = self.config.image_token_id  # in an answer it would ask for a second image
        output: Tensor = self.model.generate(
            **inputs, max_new_tokens=max_answer_tokens, do_sample=False, suppress_tokens=[image_token]
        )
        return output[0, inputs["input_ids"].shape[1] :]

    @torch.no_grad()
    def forward(self, inputs: dict[str, Tensor]) -> None:
        """Run tower and decoder once, for the hooks on the layers."""
        self.model.model(**inputs, use_cache=False)

    @torch.no_grad()
    def predict(self, states: Tensor) -> Tensor:
        """Most likely next tokens [rows] of last-layer states [rows, hidden], given before the final norm."""
        logits: Tensor = self.model.get_output_embeddings()(self.llm.norm(states))
        return logits.argmax(-1)


def family_to_calibrate(config: Any) -> Family:
    """The family of a configuration; ValueError, which names it, where the curves are not defined for it."""
    architecture = (config.architectures or [None])[0]
    family = family_of(architecture)
    if architecture in NOT_CALIBRATED:
        raise ValueError(f"cannot calibrate {family.title}: {NOT_CALIBRATED[architecture]}")
    family.check(config)
    return family


@contextmanager
def _load_errors(source: str) -> Iterator[None]:
    """Turn an error of transformers into a ValueError that names the model, first line only."""
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot load model {source!r}: {first_line}") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {name!r}: {str(error).partition(chr(10))[0]}") from None
    return device


def _extended(inputs: dict[str, Tensor], tail: Tensor) -> dict[str, Tensor]:
    """The inputs with answer tokens behind the prompt."""
    fills = {"input_ids": tail[None], "attention_mask": torch.ones_like(tail)[None]}
    fills["mm_token_type_ids"] = torch.zeros_like(tail)[None]
    return {
        key: torch.cat([value, fills[key].to(value.dtype)], dim=1) if key in fills else value
        for key, value in inputs.items()
    }
