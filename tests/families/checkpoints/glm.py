"""GLM-4.1V and GLM-4.5V: M-RoPE of half a head, patches of 8 pixels merged two by two, a timestamp per frame."""

from pathlib import Path
from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vProcessor,
    Glm4vVideoProcessor,
)

from tests.families.checkpoints import form

SPECIAL = (
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|image|>",
    "<|video|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
IMAGE = "<|begin_of_image|> <|image|> <|end_of_image|>"
VIDEO = "<|begin_of_video|> <|video|> <|end_of_video|>"
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}


def token_ids() -> dict[str, int]:
    ids = form.special_ids(SPECIAL)
    return {
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "image_start_token_id": ids["<|begin_of_image|>"],
        "image_end_token_id": ids["<|end_of_image|>"],
        "video_start_token_id": ids["<|begin_of_video|>"],
        "video_end_token_id": ids["<|end_of_video|>"],
    }


def vision() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 96,
        "out_hidden_size": form.HIDDEN_SIZE,
        "patch_size": 8,
        "image_size": 64,
        "spatial_merge_size": 2,
    }


def processor() -> Any:
    tokenizer = form.word_tokenizer(SPECIAL, image_token="<|image|>", video_token="<|video|>")
    images = Glm4vImageProcessor(patch_size=8, size={"shortest_edge": 256, "longest_edge": 2 * 128 * 128})
    videos = Glm4vVideoProcessor(patch_size=8, size={"shortest_edge": 256, "longest_edge": 8 * 80 * 80})
    return Glm4vProcessor(images, tokenizer, videos, chat_template=form.chat_template(IMAGE, VIDEO))


def glm4v(directory: Path) -> None:
    """Sandwich norms: each layer norms the outputs of attention and MLP too."""
    text = form.text_shape(rope_parameters=ROPE, attention_bias=True)  # Hugging Face always has it, vLLM reads this
    config = Glm4vConfig(text_config=text, vision_config=vision(), **token_ids())
    form.save(directory, Glm4vForConditionalGeneration, config, processor())


def glm4v_moe(directory: Path) -> None:
    """A dense first layer, then four experts of which two answer beside a shared one."""
    text = form.text_shape(
        rope_parameters=ROPE,
        head_dim=form.HEAD_SIZE,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=96,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        use_qk_norm=False,  # no field of Hugging Face's configuration, but vLLM reads it
    )
    config = Glm4vMoeConfig(text_config=text, vision_config=vision(), **token_ids())
    form.save(directory, Glm4vMoeForConditionalGeneration, config, processor())


def facts(make: Any) -> form.TinyCheckpoint:
    """Those of a GLM-V checkpoint: images of 24 and 35 tokens."""
    return form.TinyCheckpoint(
        make,
        form.placeholder(SPECIAL, IMAGE),
        ((96, 64), (80, 112)),
        video=form.placeholder(SPECIAL, VIDEO),
        video_shape=form.Video(6, (80, 64)),
    )
