"""Tiny random checkpoints in LLaVA's original format, and the Hugging Face model they must become.

The reference is put together from the modules' own parameters; it shares no table of names with the conversion.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

VOCABULARY = 128
IMAGE_TOKEN = 128
PAD_TOKEN = 129
NUM_ROWS = 192
PATCH = 8
MEAN = [0.48, 0.46, 0.41]
STD = [0.27, 0.26, 0.28]
Form = Literal["bin", "safetensors", "single"]


@dataclass(frozen=True)
class Checkpoint:
    """An original checkpoint on disk, its tower's directory, and the modules their weights came from."""

    directory: Path
    tower: Path
    language: Any
    vision: Any
    projector: dict[str, torch.Tensor]
    image_size: int

    @property
    def num_tokens(self) -> int:
        return (self.image_size // PATCH) ** 2

    def reference(self) -> Any:
        """Hugging Face's LLaVA with the same tensors, embeddings extended by their mean row."""
        text = self.language.config.to_dict() | {"vocab_size": NUM_ROWS, "pad_token_id": PAD_TOKEN}
        config = LlavaConfig(
            vision_config=self.vision.config.to_dict(),
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
        llava: Any = LlavaForConditionalGeneration(config).float().eval()
        for target, source in (
            (llava.model.language_model, self.language.model),
            (llava.lm_head, self.language.lm_head),
        ):
            target.load_state_dict({name: extended(value.float()) for name, value in source.state_dict().items()})
        llava.model.vision_tower.load_state_dict(self.vision.state_dict())
        projector = llava.model.multi_modal_projector
        for index, linear in ((0, projector.linear_1), (2, projector.linear_2)):
            linear.load_state_dict({part: self.projector[f"{index}.{part}"].float() for part in ("weight", "bias")})
        return llava


def extended(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.shape[0] != VOCABULARY:
        return tensor
    rows = [tensor, *[tensor.float().mean(0).to(tensor.dtype)[None]] * (NUM_ROWS - VOCABULARY)]
    return torch.cat(rows)


def make_original(
    directory: Path,
    *,
    form: Form = "bin",
    num_layers: int = 4,
    image_size: int = 64,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    name: str = "model",
) -> Checkpoint:
    """Write a checkpoint in ``directory/name`` and its tower in ``directory/tower``."""
    model, tower = directory / name, directory / "tower"
    model.mkdir(parents=True)
    tower.mkdir()
    language = randomised(LlamaForCausalLM(_text_config(num_layers)), 1).to(dtype)
    vision = randomised(CLIPVisionModel(_vision_config(image_size)), 2)
    generator = torch.Generator().manual_seed(3)
    shapes = {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    projector = {name: (torch.randn(shape, generator=generator) * 0.15).to(dtype) for name, shape in shapes.items()}
    named = {f"model.mm_projector.{name}": value for name, value in projector.items()}
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_weights(model, {**language.state_dict(), **named, **buffers}, form)
    _write(model / "config.json", original_config(language.config, dtype) | dict(config or {}))
    save_tokenizer(model)
    save_tower(tower, vision)
    return Checkpoint(model, tower, language, vision, projector, image_size)


def randomised(module: Any, seed: int) -> Any:
    """Wide weights, so that attention is far from flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.15, generator=generator)
    return module


def original_config(text: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The keys of a released LLaVA-1.5."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    return {key: getattr(text, key) for key in sizes} | {
        "_name_or_path": "llava-v1.5-tiny",
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "vocab_size": VOCABULARY,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.37.2",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 64,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }


def save_weights(directory: Path, weights: dict[str, torch.Tensor], form: Form) -> None:
    """Two shards and an index, or one file."""
    if form == "single":
        torch.save(weights, directory / "pytorch_model.bin")
        return
    stem, suffix = ("pytorch_model", "bin") if form == "bin" else ("model", "safetensors")
    names = list(weights)
    halves = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, part in halves.items():
        content = {name: weights[name].clone().contiguous() for name in part}
        if form == "bin":
            torch.save(content, directory / file)
        else:
            save_file(content, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    _write(directory / f"{stem}.{suffix}.index.json", index)


def tower_weights(vision: Any) -> dict[str, torch.Tensor]:
    """Under the names of a checkpoint, whatever transformers calls its modules."""
    return {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in vision.state_dict().items()}


def save_tower(directory: Path, vision: Any) -> None:
    """A full CLIP's checkpoint, text part and buffers included."""
    others = {
        "text_model.final_layer_norm.bias": torch.ones(4),
        "logit_scale": torch.tensor(2.0),
        "visual_projection.weight": torch.ones(4, 64),
        "text_projection.weight": torch.ones(4, 4),
        "vision_model.embeddings.position_ids": torch.arange(65)[None],
    }
    torch.save({**tower_weights(vision), **others}, directory / "pytorch_model.bin")
    vision_config = {k: v for k, v in vision.config.to_dict().items() if k != "transformers_version"}
    _write(directory / "config.json", {"model_type": "clip", "vision_config": vision_config})
    size = vision.config.image_size
    image = {"image_mean": MEAN, "image_std": STD, "size": size, "crop_size": size, "do_center_crop": True}
    _write(directory / "preprocessor_config.json", {"feature_extractor_type": "CLIPFeatureExtractor", **image})


def save_tokenizer(directory: Path) -> None:
    """The word ``t17`` is token 17; there is no image token."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "t1", "eos_token": "t2", "pad_token": "t0", "unk_token": "t3"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)


def wide_picture(size: int) -> Image.Image:
    """Noise, wider than high; its width is the tower's side, so that nothing is resampled."""
    noise = np.random.default_rng(5).integers(0, 256, (size * 5 // 8, size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def padded_pixels(image: Image.Image) -> torch.Tensor:
    """LLaVA's own preparation: centred on a square of the mean colour, then normalised; [1, 3, side, side]."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = (np.asarray(square, dtype=np.float32) / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]


def _text_config(num_layers: int) -> Any:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def _vision_config(image_size: int) -> Any:
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=PATCH,
        projection_dim=64,
    )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, default=str))
