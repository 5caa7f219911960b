"""Random-weight checkpoints of given sizes, written once for both engines; speed does not depend on weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_TOKEN = 32000
PEAK = 6  # how much wider than at initialisation the queries of a peaked layer are
HUB_NAMES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


@dataclass(frozen=True)
class BenchShape:
    """Sizes of a LLaVA-1.5, or of a Qwen2.5-VL, whose tower has patches of 14 pixels; images are width by height."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vision_layers: int
    vision_hidden_size: int
    vision_heads: int
    peaked_layer: int | None = None  # a text layer whose attention is far from flat, as one is in trained models
    num_kv_heads: int | None = None  # None: as many as heads
    image_size: tuple[int, int] = (336, 336)
    tokens_per_image: int = 576
    is_qwen: bool = False

    def __str__(self) -> str:
        width, height = self.image_size
        tower = f"tower of {self.vision_layers} x {self.vision_hidden_size} at {width} x {height} / 14"
        peaked = "" if self.peaked_layer is None else f", layer {self.peaked_layer} peaked"
        return f"{self.num_layers} layers x {self.hidden_size}, FFN {self.intermediate_size}, {tower}{peaked}"


SHAPES = {
    "tiny": BenchShape(8, 128, 4, 256, 2, 64, 2),
    "bench": BenchShape(16, 1024, 16, 2816, 6, 256, 4),
    "bench-peaked": BenchShape(16, 1024, 16, 2816, 6, 256, 4, peaked_layer=7),
    "qwen": BenchShape(
        16, 1024, 16, 2816, 6, 256, 4, num_kv_heads=4, image_size=(1120, 700), tokens_per_image=1000, is_qwen=True
    ),
    "2.7b": BenchShape(32, 2560, 32, 6912, 24, 1024, 16),
    "7b": BenchShape(32, 4096, 32, 11008, 24, 1024, 16),
}


def make_checkpoint(shape: BenchShape, directory: Path, dtype: str = "bfloat16", *, weights: bool = True) -> Path:
    """Write a checkpoint that vLLM and Hugging Face load, unless it is there; returns ``directory``.

    One without ``weights`` is for vLLM's ``load_format`` "dummy".
    """
    if (directory / "complete").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = _config(shape, dtype)
    config.save_pretrained(directory)
    save_processor = _save_qwen_processor if shape.is_qwen else _save_processor
    save_processor(directory, save_word_tokenizer(directory, IMAGE_TOKEN, has_video=shape.is_qwen))
    if weights:
        model = _build(config, dtype)
        if shape.peaked_layer is not None:
            model.model.language_model.layers[shape.peaked_layer].self_attn.q_proj.weight.data.mul_(PEAK)
        if shape.is_qwen:
            model.save_pretrained(directory)
        else:
            save_hub_weights(model, directory)
    (directory / "complete").touch()
    return directory


def _config(shape: BenchShape, dtype: str) -> Any:
    import torch

    config = _qwen_config(shape) if shape.is_qwen else _llava_config(shape)
    config.dtype = getattr(torch, dtype)
    return config


def _text_sizes(shape: BenchShape) -> dict[str, Any]:
    return {
        "vocab_size": IMAGE_TOKEN + 64,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads or shape.num_heads,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _qwen_config(shape: BenchShape) -> Any:
    from transformers import Qwen2_5_VLConfig

    section = shape.hidden_size // shape.num_heads // 8  # as in the released models: 2 parts of 8, 3 and 3
    text = _text_sizes(shape) | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [section, section * 3 // 2, section * 3 // 2],
        }
    }
    vision = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden_size,
        "num_heads": shape.vision_heads,
        "intermediate_size": 4 * shape.vision_hidden_size,
        "out_hidden_size": shape.hidden_size,
        "fullatt_block_indexes": [shape.vision_layers - 1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=IMAGE_TOKEN + 2,
        vision_end_token_id=IMAGE_TOKEN + 3,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def _llava_config(shape: BenchShape) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden_size,
        intermediate_size=4 * shape.vision_hidden_size,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(**_text_sizes(shape))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-2)
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def save_word_tokenizer(directory: Path, image_token: int, has_video: bool = False) -> Any:
    """Save a tokenizer whose word ``t17`` is token 17, up to the image token; a video's token may follow."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<image>", "<video>"] if has_video else ["<image>"]
    words = {f"t{i}": i for i in range(image_token)} | {token: image_token + i for i, token in enumerate(special)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="t1",
        eos_token="t2",
        pad_token="t0",
        unk_token="t3",
        extra_special_tokens={f"{token[1:-1]}_token": token for token in special},
    )
    fast.save_pretrained(directory)
    return fast


def save_hub_weights(model: Any, directory: Path) -> None:
    """Save the weights of a Hugging Face LLaVA under the names that vLLM and the hub use."""
    from safetensors.torch import save_file

    weights = {_hub_name(name): value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _hub_name(name: str) -> str:
    old = next(prefix for prefix in HUB_NAMES if name.startswith(prefix))
    return HUB_NAMES[old] + name.removeprefix(old)


def _save_processor(directory: Path, tokenizer: Any) -> None:
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = {"height": 336, "width": 336}
    pictures = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    LlavaProcessor(pictures, tokenizer, patch_size=14, num_additional_image_tokens=1).save_pretrained(directory)


def _save_qwen_processor(directory: Path, tokenizer: Any) -> None:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    sizes = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}}
    pictures, videos = Qwen2VLImageProcessor(**sizes), Qwen2VLVideoProcessor(**sizes)
    Qwen2_5_VLProcessor(pictures, tokenizer, videos).save_pretrained(directory)


def random_model(shape: BenchShape, dtype: str) -> Any:
    """A Hugging Face model of a shape with seeded random weights."""
    return _build(_config(shape, dtype), dtype)


def _build(config: Any, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        return AutoModelForImageTextToText.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
