"""Random-weight LLaVA checkpoints that run in seconds, in the hub's format, for vLLM and Hugging Face alike.

Weights are wide (std 0.15), so attention is far from flat and a wrong selection changes the tokens.
"""

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

IMAGE_SIZE = 64
TOKENS_PER_IMAGE = 64
NUM_LAYERS = 8
VOCABULARY = 128
IMAGE_TOKEN = 127
EOS_TOKEN = 2


def text_config(name: str) -> Any:
    """Llama without, Mistral and Qwen2 with grouped KV heads; heads of 32, the smallest on CPU."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "eos_token_id": EOS_TOKEN,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if name == "llama":
        return LlamaConfig(**shape, num_key_value_heads=4)
    if name == "mistral":
        return MistralConfig(**shape, num_key_value_heads=2, sliding_window=None)
    return Qwen2Config(**shape, num_key_value_heads=1)


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
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.15, generator=generator)
    save_hub_weights(model, directory)
    config.save_pretrained(directory)
    save_word_tokenizer(directory, IMAGE_TOKEN)
    save_processor(directory, tower)
    return directory
