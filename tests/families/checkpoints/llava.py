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
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
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
    return config_class(**shape | others)


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


def llava_next_video(directory: Path) -> None:
    """LLaVA-NeXT whose frames are pooled to 4 x 4 tokens, without newlines; vLLM's takes one video and no image.

    vLLM's pooler divides by ``image_size // patch_size**2``, which a patch of 16 pixels would make 0.
    """
    ids = form.special_ids(SPECIAL)
    config = LlavaNextVideoConfig(
        vision_config=tower(CLIPVisionConfig, patch_size=8),
        text_config=LlamaConfig(**form.text_shape()),
        image_token_index=ids[IMAGE],
        video_token_index=ids[VIDEO],
        image_grid_pinpoints=TILES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        spatial_pool_stride=2,
    )
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    processor = LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**size),
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=TILES, **size),
        tokenizer=form.word_tokenizer(SPECIAL, image_token=IMAGE, video_token=VIDEO),
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        video_token=VIDEO,
        num_additional_image_tokens=1,
        chat_template=form.chat_template(IMAGE, VIDEO),
    )
    form.save(directory, LlavaNextVideoForConditionalGeneration, config, processor)
    form.rewrite_weights(directory, rename_tower)


def llava_onevision(directory: Path) -> None:
    """SigLIP with all its layers, Qwen2; a video's frames are pooled to 2 x 2 tokens, one newline ends them."""
    ids = form.special_ids(SPECIAL)
    config = LlavaOnevisionConfig(
        vision_config=tower(SiglipVisionConfig, vision_use_head=False),
        text_config=Qwen2Config(**form.text_shape()),
        image_token_index=ids[IMAGE],
        video_token_index=ids[VIDEO],
        image_grid_pinpoints=TILES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    size = {"size": {"height": 64, "width": 64}}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(image_grid_pinpoints=TILES, **size),
        form.word_tokenizer(SPECIAL, image_token=IMAGE, video_token=VIDEO),
        LlavaOnevisionVideoProcessor(**size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=form.chat_template(IMAGE, VIDEO),
    )
    form.save(directory, LlavaOnevisionForConditionalGeneration, config, processor)
    form.rewrite_weights(directory, rename_tower)


LLAVA_NEXT = form.TinyCheckpoint(llava_next, form.placeholder(SPECIAL, IMAGE), SIZES)
LLAVA_NEXT_VIDEO = form.TinyCheckpoint(
    llava_next_video,
    image=(),
    image_sizes=(),
    video=form.placeholder(SPECIAL, VIDEO),
    video_shape=form.Video(4, (64, 64)),
)
LLAVA_ONEVISION = form.TinyCheckpoint(
    llava_onevision,
    form.placeholder(SPECIAL, IMAGE),
    SIZES,
    video=form.placeholder(SPECIAL, VIDEO),
    video_shape=form.Video(6, (64, 64)),
)
