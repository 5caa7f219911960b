"""The configuration and the image processor of the converted model, from those of its parts.

Where ``image_aspect_ratio`` is "pad", an image is padded to a square with the mean colour, as LLaVA does, then resized
(transformers' LlavaImageProcessor with ``do_pad``); Hugging Face's own conversion of LLaVA-1.5 crops instead. Other
values get CLIP's processor: the shorter side is resized, the centre kept.

**Differs** by rounding: torchvision resizes tensors here, Pillow images in LLaVA, both bicubic and antialiased.
"""

from collections.abc import Mapping
from typing import Any

from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.lab.convert.original import Original, Tower
from vllm_hidrop.lab.convert.tokens import IMAGE_TOKEN, Tokens
from vllm_hidrop.methods import ModelShape

ROWS_MULTIPLE = 64
"""Embedding rows are rounded up to a multiple, as in the hub's llava-1.5: 32064 rows for 32000 + 2 tokens."""
TEXT_KEYS = (
    *("attention_bias", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "initializer_range"),
    *("intermediate_size", "max_position_embeddings", "mlp_bias", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "rms_norm_eps"),
)
VISION_KEYS = (
    *("attention_dropout", "hidden_act", "hidden_size", "image_size", "intermediate_size", "layer_norm_eps"),
    *("num_attention_heads", "num_channels", "num_hidden_layers", "patch_size", "projection_dim"),
)
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
BICUBIC = 3
DEFAULT_ROPE_THETA = 10000.0


def build_config(original: Original, tower: Tower, tokens: Tokens, entry: Mapping[str, Any] | None) -> Any:
    """A LlavaConfig with ``image_aspect_ratio`` and, as "hidrop", the ``entry``; ValueError: they do not fit."""
    from transformers import CLIPVisionConfig, LlavaConfig

    source = original.config
    vision = CLIPVisionConfig(**{key: tower.config[key] for key in VISION_KEYS if key in tower.config})
    expected = source.get("mm_hidden_size", vision.hidden_size)
    if expected != vision.hidden_size:
        raise ValueError(
            f"the projector reads {expected} features (mm_hidden_size), the tower has {vision.hidden_size}"
        )
    num_patches = (vision.image_size // vision.patch_size) ** 2
    keeps_class_token = source.get("mm_vision_select_feature") == "cls_patch"
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text_config(source, tokens),
        image_token_index=tokens.image_id,
        image_seq_length=num_patches + keeps_class_token,
        vision_feature_layer=source.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if keeps_class_token else "default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        pad_token_id=tokens.pad_id,
        image_aspect_ratio=source.get("image_aspect_ratio"),
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    if entry is not None:
        shape = ModelShape(config.text_config.num_hidden_layers, config.image_seq_length)
        options = entry.get("options")
        config.hidrop = dict(entry) if options is None else {**entry, "options": {"shape": list(shape.size), **options}}
        resolve(HidropConfig.parse({}), shape, config.hidrop)
    return config


def config_json(config: Any, dtype: str) -> dict[str, Any]:
    """The content of ``config.json``; ``dtype`` is torch's name. ``rope_theta`` stands where vLLM looks for it, too."""
    content = config.to_dict()
    content["dtype"] = dtype
    content["text_config"]["rope_theta"] = content["text_config"]["rope_parameters"]["rope_theta"]
    return content


def num_rows(vocab_size: int, tokens: Tokens) -> int:
    """Embedding rows of the converted model: those of the original and the new tokens, rounded up."""
    needed = max(vocab_size, tokens.image_id + 1, tokens.pad_id + 1)
    return -(-needed // ROWS_MULTIPLE) * ROWS_MULTIPLE


def _text_config(source: Mapping[str, Any], tokens: Tokens) -> Any:
    from transformers import LlamaConfig

    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        if not isinstance(source.get(key), int):
            raise ValueError(f"config.json has no {key}")
    scaling = dict(source.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or "default"
    rope = {"rope_type": kind, "rope_theta": source.get("rope_theta") or DEFAULT_ROPE_THETA} | scaling
    return LlamaConfig(
        **{key: source[key] for key in TEXT_KEYS if source.get(key) is not None},
        vocab_size=num_rows(source["vocab_size"], tokens),
        pad_token_id=tokens.pad_id,
        rope_parameters=rope,
        tie_word_embeddings=False,
    )


def image_processor_json(tower: Tower, config: Any) -> dict[str, Any]:
    """The content of ``preprocessor_config.json``."""
    side = config.vision_config.image_size
    pads = config.image_aspect_ratio == "pad"
    return {
        "image_processor_type": "LlavaImageProcessor" if pads else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        **({"do_pad": True} if pads else {}),
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": tower.processor.get("image_mean", CLIP_MEAN),
        "image_std": tower.processor.get("image_std", CLIP_STD),
        "do_convert_rgb": True,
    }


def processor_json(config: Any) -> dict[str, Any]:
    """The content of ``processor_config.json``; the one additional token is CLIP's class token."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": config.vision_config.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
