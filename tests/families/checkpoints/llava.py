"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: a base view and tiles of 64 pixels, with a newline per row."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from tests.families.checkpoints import form

SPECIAL = ("<image>", "<video>")
IMAGE = "<image>"
VIDEO = "<video>"
TILES = [[64, 128], [128, 64], [128, 128]]
"""Height and width of the resolutions that an image is cut into tiles of."""

SIZES = ((64, 32), (40, 128))


def tower(config_class: Any, **others: Any) -> Any:
    """Three layers; patches of 16 pixels, so 4 x 4 in a tile of 64 pixels."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    return config_class(**shape, **others)


def rename_tower(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Hugging Face saves the tower's weights without a level of names that vLLM and the hub have."""
    is_old = "vision_tower.vision_model." in name
    return name if is_old else name.replace("vision_tower.", "vision_tower.vision_model."), value


def llava_next(directory: Path) -> None:
    """CLIP, of which the features are taken before the last layer and without the class token; Llama."""
    ids = form.special_ids(SPECIAL)
    config = LlavaNextConfig(
        vision_config=tower(CLIPVisionConfig),
        text_config=LlamaConfig(**form.text_shape()),
        image_token_index=ids[IMAGE],
        image_grid_pinpoints=TILES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_grid_pinpoints=TILES
        ),
        form.word_tokenizer(SPECIAL, image_token=IMAGE),
        patch_size=16,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=form.chat_template(IMAGE),
    )
    form.save(directory, LlavaNextForConditionalGeneration, config, processor)
    form.rewrite_weights(directory, rename_tower)


LLAVA_NEXT = form.TinyCheckpoint(llava_next, form.placeholder(SPECIAL, IMAGE), SIZES)
