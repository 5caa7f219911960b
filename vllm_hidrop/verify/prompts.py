"""Questions as prompts of a model of any family: what vLLM's own processor and tokenizer say of images and text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vllm_hidrop.verify.cases import IMAGE, Question

Size = tuple[int, int]
"""Width and height of an image."""

SIZES = ((96, 64), (80, 112), (224, 224), (448, 336), (336, 560), (672, 112), (672, 448))
LEAST_TOKENS = 128
"""Of an image, where one of ``SIZES`` has as many."""


@dataclass(frozen=True)
class Prompt:
    """What vLLM made of a question: its token ids with images expanded, the ``spans`` and ``sizes`` of its images.

    A span is the first token of an image and the one behind its last, row breaks between them included.
    """

    token_ids: list[int]
    spans: list[tuple[int, int]]
    sizes: list[Size]

    @property
    def num_vision(self) -> int:
        """Vision tokens of all images."""
        return sum(end - first for first, end in self.spans)


class Prompts:
    """Makes prompts for a vLLM engine (``LLMEngine``). Raises ValueError: its model takes no images."""

    def __init__(self, engine: Any) -> None:
        from vllm.model_executor.model_loader.utils import get_model_cls

        tokenizer, self._processor = engine.get_tokenizer(), engine.renderer.mm_processor
        if self._processor is None or "image" not in self._processor.info.supported_mm_limits:
            raise ValueError("the model takes no images, and verify asks with nothing else")
        text = get_model_cls(engine.model_config).get_placeholder_str("image", 1)  # None where a template alone knows
        text = text or self._processor.dummy_inputs.get_dummy_text({"image": 1})
        self._placeholder: list[int] = tokenizer.encode(text, add_special_tokens=False)
        self._start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._special = set(tokenizer.all_special_ids)
        self._special |= {n for n, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
        self.sizes = choose_sizes({size: self._num_tokens(size) for size in SIZES})
        ordinary = set(tokenizer.get_vocab().values()) - self._special
        self._text = sorted(token for token in ordinary if token < engine.model_config.get_vocab_size())

    def _num_tokens(self, size: Size) -> int:
        """Vision tokens of an image; what its processor puts around them is no text."""
        items = self._processor.info.parse_mm_data({"image": [picture(0, size)]})
        made = self._processor(self._placeholder, items)
        self._special |= set(made["prompt_token_ids"])
        first, end = span_of(made["mm_placeholders"]["image"][0])
        return end - first

    def media(self, question: Question) -> list[Size]:
        """The size of each image: one after the other has the one and the other size."""
        return [self.sizes[seed % 2] for seed in question.images]

    def make(self, question: Question) -> dict[str, Any]:
        """For vLLM: token ids with a placeholder per image, and the images."""
        tokens = list(self._start)
        for part in question.parts:
            tokens += self._placeholder if part == IMAGE else [self._text[part % len(self._text)]]
        images = pictures(question, self.media(question))
        return {"prompt_token_ids": tokens} | ({"multi_modal_data": {"image": images}} if images else {})

    def made(self, question: Question, request: Any) -> Prompt:
        """What became of a question, by vLLM's ``Request``."""
        ordered = sorted(request.mm_features, key=lambda feature: feature.mm_position.offset)
        spans = [span_of(feature.mm_position) for feature in ordered]
        return Prompt(list(request.prompt_token_ids), spans, self.media(question))


def choose_sizes(num_tokens: dict[Size, int]) -> tuple[Size, Size]:
    """Two sizes with few vision tokens, but ``LEAST_TOKENS`` where images have as many; of two numbers if possible."""
    by_number = {num_tokens[size]: size for size in reversed(num_tokens)}
    numbers = sorted(by_number)
    enough = [number for number in numbers if number >= LEAST_TOKENS]
    chosen = enough[:2] if len(enough) > 1 else numbers[-2:]
    return by_number[chosen[0]], by_number[chosen[-1]]


def span_of(position: Any) -> tuple[int, int]:
    """Of vLLM's ``PlaceholderRange``: the first token that is embedded, and the one behind the last."""
    runs = position.extract_embeds_range()
    return runs[0][0], runs[-1][1] + 1


def picture(seed: int, size: Size) -> Image.Image:
    """A noise image."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def pictures(question: Question, sizes: Sequence[Size]) -> list[Image.Image]:
    """The images of a question."""
    return [picture(seed, size) for seed, size in zip(question.images, sizes, strict=True)]
