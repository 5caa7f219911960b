"""A tiny Qwen3-VL: interleaved M-RoPE, deepstack, images of any size.

Patches of 8 pixels are merged two by two, so a token is 16 x 16 pixels.
"""

from pathlib import Path
from typing import Any

from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vllm_hidrop.verify import tiny_parts

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE = "<|vision_start|> <|image_pad|> <|vision_end|>"
VIDEO = "<|vision_start|> <|video_pad|> <|vision_end|>"


def token_ids() -> dict[str, int]:
    """The special tokens' names in a configuration."""
    ids = tiny_parts.special_ids(SPECIAL)
    return {
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
    }


def processor(processor_class: Any, video_class: Any) -> Any:
    """A processor that leaves the test's images and videos at their sizes.

    vLLM normalizes both in the tower with the images' mean and deviation, so they must be those of the videos.
    """
    tokenizer = tiny_parts.word_tokenizer(
        SPECIAL,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_bos_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        vision_eos_token="<|vision_end|>",
    )
    pixels = {"patch_size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = Qwen2VLImageProcessor(size={"shortest_edge": 256, "longest_edge": 128 * 128}, **pixels)
    videos = video_class(size={"shortest_edge": 256, "longest_edge": 8 * 80 * 80}, **pixels)
    return processor_class(images, tokenizer, videos, chat_template=tiny_parts.chat_template(IMAGE, VIDEO))


def rope(section: list[int], **others: Any) -> dict[str, Any]:
    """M-RoPE with this many frequencies for time, height and width."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section} | others


def qwen3_vision(**others: Any) -> dict[str, Any]:
    """The tower of Qwen3-VL: learned positions of an 8 x 8 grid, interpolated."""
    return {
        "depth": 4,
        "hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 96,
        "out_hidden_size": tiny_parts.HIDDEN_SIZE,
        "patch_size": 8,
        "num_position_embeddings": 64,
    } | others


def qwen3_vl(directory: Path) -> None:
    """Three deepstack levels: features of tower layers 0, 1, 2 are added after text layers 0, 1, 2."""
    text = tiny_parts.text_shape(head_dim=tiny_parts.HEAD_SIZE, rope_parameters=rope([6, 5, 5], mrope_interleaved=True))
    vision = qwen3_vision(deepstack_visual_indexes=[0, 1, 2])
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **token_ids())
    tiny_parts.save(
        directory, Qwen3VLForConditionalGeneration, config, processor(Qwen3VLProcessor, Qwen3VLVideoProcessor)
    )
