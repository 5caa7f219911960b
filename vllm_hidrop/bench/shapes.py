"""Random-weight LLaVA checkpoints of given sizes, written once for both engines; speed does not depend on weights."""

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
    """Sizes of a LLaVA with a CLIP tower at 336 pixels in patches of 14: 576 tokens per image."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vision_layers: int
    vision_hidden_size: int
    vision_heads: int
    peaked_layer: int | None = None  # a text layer whose attention is far from flat, as one is in trained models

    def __str__(self) -> str:
        tower = f"tower of {self.vision_layers} x {self.vision_hidden_size} at 336/14"
        peaked = "" if self.peaked_layer is None else f", layer {self.peaked_layer} peaked"
        return f"{self.num_layers} layers x {self.hidden_size}, FFN {self.intermediate_size}, {tower}{peaked}"


SHAPES = {
    "tiny": BenchShape(8, 128, 4, 256, 2, 64, 2),
    "bench": BenchShape(16, 1024, 16, 2816, 6, 256, 4),
    "bench-peaked": BenchShape(16, 1024, 16, 2816, 6, 256, 4, peaked_layer=7),
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
    _save_processor(directory, save_word_tokenizer(directory, IMAGE_TOKEN))
    if weights:
        model = _build(config, dtype)
        if shape.peaked_layer is not None:
            model.model.language_model.layers[shape.peaked_layer].self_attn.q_proj.weight.data.mul_(PEAK)
        save_hub_weights(model, directory)
    (directory / "complete").touch()
    return directory


def _config(shape: BenchShape, dtype: str) -> Any:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden_size,
        intermediate_size=4 * shape.vision_hidden_size,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=IMAGE_TOKEN + 64,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-2)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = getattr(torch, dtype)
    return config


def save_word_tokenizer(directory: Path, image_token: int) -> Any:
    """Save a tokenizer whose word ``t17`` is token 17, up to the image token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(image_token)} | {"<image>": image_token}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<image>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", pad_token="t0", unk_token="t3"
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


def random_model(shape: BenchShape, dtype: str) -> Any:
    """A Hugging Face LLaVA of a shape with seeded random weights."""
    return _build(_config(shape, dtype), dtype)


def _build(config: Any, dtype: str) -> Any:
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        return LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
