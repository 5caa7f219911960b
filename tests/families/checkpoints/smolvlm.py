"""Idefics3 and SmolVLM: tiles of 64 pixels named by row and column, then the whole image; Llama."""

from pathlib import Path
from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.families.checkpoints import form

ROWS = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
SPECIAL = ("<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>", *ROWS)
IMAGE = "<image>"
TOKENS_PER_TILE = 16
TILE = {"longest_edge": 64}
IMAGE_EDGE = {"longest_edge": 128}


def _config(config_class: Any) -> Any:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
    }
    return config_class(
        vision_config=vision,
        text_config=LlamaConfig(**form.text_shape()),
        image_token_id=form.special_ids(SPECIAL)[IMAGE],
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def _tokenizer() -> Any:
    names = {
        "image_token": IMAGE,
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    return form.word_tokenizer(SPECIAL, **names)


def idefics3(directory: Path) -> None:
    """Patches of 8 pixels, shuffled two by two into 4 x 4 tokens of a tile."""
    images = Idefics3ImageProcessor(size=IMAGE_EDGE, max_image_size=TILE)
    template = form.chat_template(IMAGE)
    processor = Idefics3Processor(images, _tokenizer(), image_seq_len=TOKENS_PER_TILE, chat_template=template)
    form.save(directory, Idefics3ForConditionalGeneration, _config(Idefics3Config), processor)


def smolvlm(directory: Path) -> None:
    """As Idefics3; vLLM's takes no video."""
    images = SmolVLMImageProcessor(size=IMAGE_EDGE, max_image_size=TILE)
    videos = SmolVLMVideoProcessor(size=TILE, max_image_size=TILE)
    template = form.chat_template(IMAGE)
    processor = SmolVLMProcessor(images, _tokenizer(), videos, image_seq_len=TOKENS_PER_TILE, chat_template=template)
    form.save(directory, SmolVLMForConditionalGeneration, _config(SmolVLMConfig), processor)


def facts(make: Any) -> form.TinyCheckpoint:
    """Three and five tiles: 48 and 80 vision tokens."""
    return form.TinyCheckpoint(make, form.placeholder(SPECIAL, IMAGE), ((128, 48), (96, 64)))
