"""InternVL in the released form: configuration by code of the checkpoint, names of its own, with Qwen3 and InternLM2.

The same weights lie in Hugging Face's form in the checkpoint's ``hugging_face``; InternLM2 computes what Llama does,
with Q, K and V in one matrix.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from shutil import copy
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from tests.families.checkpoints import form, internvl

VIDEO_PAD = "<|video_pad|>"
IMAGE = "<image>"
SPECIAL = (*internvl.SPECIAL, IMAGE, VIDEO_PAD)
CODE = Path(__file__).with_name("configuration_internvl_chat.py")

Weights = dict[str, torch.Tensor]

NAMES = (
    (r"vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"vision_tower\.embeddings\.position_embeddings", "vision_model.embeddings.position_embedding"),
    (r"vision_tower\.embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
    (r"vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"attention\.projection_layer", "attn.proj"),
    (r"attention\.qkv", "attn.qkv"),
    (r"lambda_([12])", r"ls\1"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"multi_modal_projector\.linear_1", "mlp1.1"),
    (r"multi_modal_projector\.linear_2", "mlp1.3"),
)
"""Of tower and projector, Hugging Face's -> the released checkpoints'."""

INTERNLM2_NAMES = (
    (r"embed_tokens", "tok_embeddings"),
    (r"lm_head", "output"),
    (r"self_attn\.qkv", "attention.wqkv"),
    (r"self_attn\.o_proj", "attention.wo"),
    (r"mlp\.gate_proj", "feed_forward.w1"),
    (r"mlp\.down_proj", "feed_forward.w2"),
    (r"mlp\.up_proj", "feed_forward.w3"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
)
"""Of the text model, Llama's -> InternLM2's."""


def joined(weights: Weights, attention: str, join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Weights:
    """With Q, K and V of every module whose name ends with ``attention`` in one ``qkv``."""
    found = {name: value for name, value in weights.items() if not re.search(rf"{attention}\.[qkv]_proj", name)}
    for name in weights:
        if name.endswith(f"{attention}.q_proj.weight"):
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[name.replace("q_proj", "qkv")] = join(parts)
    return found


def by_kv_head(parts: list[torch.Tensor]) -> torch.Tensor:
    """Q, K and V as InternLM2 stores them: of every KV head the queries that share it, its key, its value."""
    heads = [part.unflatten(0, (form.NUM_KV_HEADS, -1)) for part in parts]
    return torch.cat(heads, 1).flatten(0, 1)


def renamed(weights: Weights, names: tuple[tuple[str, str], ...]) -> Weights:
    """With every pattern of ``names`` replaced."""

    def new_name(name: str) -> str:
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        return name

    return {new_name(name): value.contiguous() for name, value in weights.items()}


def chat(directory: Path, text_config: PreTrainedConfig, architecture: str) -> None:
    """Both forms; ``architecture`` is the text model's in the released one."""
    other = directory / form.HUGGING_FACE
    other.mkdir()
    internvl.hugging_face(other, text_config, SPECIAL, IMAGE, as_released=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        copy(other / name, directory)
    copy(CODE, directory)
    config = released_config(json.loads((other / "config.json").read_text()), architecture)
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(other / "model.safetensors")
    weights.setdefault("language_model.lm_head.weight", weights["language_model.model.embed_tokens.weight"].clone())
    weights = renamed(joined(weights, r"attention", torch.cat), NAMES)
    if architecture == "InternLM2ForCausalLM":
        weights = renamed(joined(weights, "self_attn", by_kv_head), INTERNLM2_NAMES)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def released_config(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The configuration file of the released form."""
    tower, text = config["vision_config"], dict(config["text_config"])
    rope = text.pop("rope_parameters")
    if architecture == "InternLM2ForCausalLM":
        text["model_type"] = "internlm2"
    own = {"architectures": [architecture], "rope_theta": rope["rope_theta"], "tie_word_embeddings": False}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": f"{CODE.stem}.InternVLChatConfig"},
        "dtype": "float32",
        "vision_config": {name: tower[name] for name in sizes}
        | {"image_size": tower["image_size"][0], "patch_size": tower["patch_size"][0]},
        "llm_config": text | own,
        "force_image_size": tower["image_size"][0],
        "max_dynamic_patch": internvl.MAX_TILES,
        "tie_word_embeddings": False,
    }


def qwen3(directory: Path) -> None:
    """As InternVL3.5."""
    chat(directory, Qwen3Config(**form.text_shape(head_dim=form.HEAD_SIZE)), "Qwen3ForCausalLM")


def internlm2(directory: Path) -> None:
    """As the middle sizes of InternVL2.5."""
    chat(directory, LlamaConfig(**form.text_shape()), "InternLM2ForCausalLM")


def facts(make: Callable[[Path], None], *, has_video: bool) -> form.TinyCheckpoint:
    """vLLM takes videos with Qwen3, not with InternLM2."""
    ids = form.special_ids(SPECIAL)
    made = partial(
        form.TinyCheckpoint,
        make,
        form.placeholder(SPECIAL, IMAGE),
        internvl.INTERNVL.image_sizes,
        is_remote_code=True,
        as_hugging_face={ids[internvl.IMAGE]: ids[IMAGE], ids[VIDEO_PAD]: ids[IMAGE]},
    )
    if not has_video:
        return made()
    return made(video=form.placeholder(SPECIAL, internvl.VIDEO), video_shape=internvl.INTERNVL.video_shape)
