"""Random-weight LLaVA checkpoints that run in seconds, in the hub's format, for vLLM and Hugging Face alike."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from vllm_hidrop.bench.shapes import save_hub_weights, save_word_tokenizer
from vllm_hidrop.verify.tiny_parts import NUM_LAYERS, VOCABULARY, text_shape, widen

__all__ = [
    "EOS_TOKEN",
    "IMAGE_SIZE",
    "IMAGE_TOKEN",
    "NUM_LAYERS",
    "TOKENS_PER_IMAGE",
    "VOCABULARY",
    "make_llava",
    "text_config",
    "vision_config",
]

IMAGE_SIZE = 64
TOKENS_PER_IMAGE = 64
IMAGE_TOKEN = 127
EOS_TOKEN = 2


def text_config(name: str) -> Any:
    """Llama without, Mistral and Qwen2 with grouped KV heads; heads of 32, the smallest on CPU."""
    if name == "llama":
        return LlamaConfig(**text_shape(num_key_value_heads=4))
    if name == "mistral":
        return MistralConfig(**text_shape(sliding_window=None))
    return Qwen2Config(**text_shape(num_key_value_heads=1))


def vision_config(name: str) -> Any:
    """CLIP with one spare layer (feature layer -2), SigLIP likewise."""
    cls = CLIPVisionConfig if name == "clip" else SiglipVisionConfig
    return cls(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        **({} if name == "clip" else {"vision_use_head": False}),
    )


def save_processor(directory: Path, tower: str) -> None:
    """An image processor that resizes to the tower's size, and LLaVA's processor around it."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor" if tower == "clip" else "SiglipImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_resize": True,
        "size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
        "do_convert_rgb": True,
        "resample": 3,
    }
    if tower == "clip":
        image |= {"do_center_crop": False, "crop_size": size}
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": 8,
        "num_additional_image_tokens": 1 if tower == "clip" else 0,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(image))
    (directory / "processor_config.json").write_text(json.dumps(processor))


def make_llava(directory: Path, text: str = "llama", tower: str = "clip", seed: int = 7) -> Path:
    """Write a checkpoint and return its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = LlavaConfig(
        vision_config=vision_config(tower),
        text_config=text_config(text),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = torch.float32
    model = LlavaForConditionalGeneration(config)
    widen(model, seed)
    save_hub_weights(model, directory)
    config.save_pretrained(directory)
    save_word_tokenizer(directory, IMAGE_TOKEN)
    save_processor(directory, tower)
    return directory
