"""Shape of the embedded model and its checkpoint directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vllm_hidrop.lab.atomic_write import write_json
from vllm_hidrop.lab.convert.hub_config import processor_json
from vllm_hidrop.lab.convert.weights import hub_name
from vllm_hidrop.lab.train.scenes import IMAGE_SIDE, NUM_PATCHES, PATCH_SIDE
from vllm_hidrop.lab.train.vocabulary import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    IMAGE,
    PAD,
    SPECIAL_TOKENS,
    TOKEN_IDS,
    UNK,
    build_tokenizer,
)

HIDDEN_SIZE = 128
FFN_SIZE = 384
NUM_HEADS = 4
NUM_LLM_LAYERS = 12
NUM_TOWER_LAYERS = 4
FEATURE_LAYER = -2
"""The last tower layer is a spare: vLLM post-normalises the output of a tower used in full."""
ROPE_THETA = 1e6
MAX_POSITIONS = 16384
LAST_FILE = "chat_template.jinja"
"""The file that is written last into a checkpoint: where it is, the others are."""


def build_config() -> LlavaConfig:
    """Configuration that Hugging Face and vLLM load alike."""
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=FFN_SIZE,
        projection_dim=HIDDEN_SIZE,
        num_hidden_layers=NUM_TOWER_LAYERS,
        num_attention_heads=NUM_HEADS,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIDE,
    )
    text = LlamaConfig(
        vocab_size=len(TOKEN_IDS),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=FFN_SIZE,
        num_hidden_layers=NUM_LLM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        head_dim=HIDDEN_SIZE // NUM_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[EOS],
        pad_token_id=TOKEN_IDS[PAD],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_IDS[IMAGE],
        image_seq_length=NUM_PATCHES,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """A float32 model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    config = build_config()
    config._attn_implementation = "sdpa"
    return LlavaForConditionalGeneration(config).float()


def _save_processor(directory: Path) -> None:
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        "do_center_crop": False,
        "crop_size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        "resample": 3,
    }
    write_json(directory / "processor_config.json", processor_json(build_config()))
    write_json(directory / "preprocessor_config.json", image_processor)
    (directory / LAST_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")


def _save_tokenizer(directory: Path) -> None:
    build_tokenizer().save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**content, "tokenizer_class": "PreTrainedTokenizerFast"})
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    extra = [token for token in SPECIAL_TOKENS if token not in named.values()]
    write_json(directory / "special_tokens_map.json", {**named, "additional_special_tokens": extra})


def save_checkpoint(
    model: LlavaForConditionalGeneration, directory: Path, trained: Mapping[str, Any] | None = None
) -> None:
    """Write a bfloat16 checkpoint for ``from_pretrained`` and vLLM; ``trained`` is its schedule's ``hidrop`` entry."""
    directory.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] = {
        hub_name(name): tensor.detach().to(torch.bfloat16).contiguous().clone()
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = ["LlavaForConditionalGeneration"]
    config["dtype"] = "bfloat16"
    if trained is not None:
        config["hidrop"] = dict(trained)
    config["text_config"]["rope_theta"] = ROPE_THETA
    write_json(directory / "config.json", config)
    # Greedy for clients that set no temperature: vLLM reads top_k from here, but not do_sample, and
    # would make max_new_tokens a limit for all requests.
    GenerationConfig(
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[EOS],
        pad_token_id=TOKEN_IDS[PAD],
        do_sample=True,
        top_k=1,
    ).save_pretrained(directory)
    _save_tokenizer(directory)
    _save_processor(directory)
