"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: M-RoPE, patches of 8 pixels merged two by two, so a token is 16 x 16 pixels."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.families.checkpoints import form
from vllm_hidrop.verify.tiny_qwen import IMAGE, SPECIAL, VIDEO, processor, qwen3_vision, rope, token_ids

SIZES = ((96, 64), (80, 112))
"""24 and 35 tokens."""


def facts(make: Any, **others: Any) -> form.TinyCheckpoint:
    """Those of a Qwen-VL checkpoint; the video has three pairs of frames of 20 tokens."""
    return form.TinyCheckpoint(
        make,
        image=form.placeholder(SPECIAL, IMAGE),
        image_sizes=SIZES,
        video=form.placeholder(SPECIAL, VIDEO),
        video_shape=form.Video(6, (80, 64)),
        **others,
    )


def qwen2_vl(directory: Path) -> None:
    """Its tower attends to the whole image."""
    vision = {
        "depth": 2,
        "embed_dim": 64,
        "num_heads": 2,
        "mlp_ratio": 2,
        "hidden_size": form.HIDDEN_SIZE,
        "patch_size": 8,
    }
    text = form.text_shape(rope_parameters=rope([4, 6, 6]))
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **token_ids())
    form.save(directory, Qwen2VLForConditionalGeneration, config, processor(Qwen2VLProcessor, Qwen2VLVideoProcessor))


def qwen2_5_vl(directory: Path) -> None:
    """Its tower's first and third layer attend in windows of 32 pixels: at most 2 x 2 tokens.

    With 2 positions a second the last pair of frames of the video is at 4. Were it beyond 4, Hugging Face 5.19 and vLLM
    would differ: text goes on behind the larger of height and width in the former, behind the highest position in vLLM.
    """
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 96,
        "out_hidden_size": form.HIDDEN_SIZE,
        "patch_size": 8,
        "window_size": 32,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    text = form.text_shape(rope_parameters=rope([4, 6, 6]))
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **token_ids())
    ours = processor(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
    form.save(directory, Qwen2_5_VLForConditionalGeneration, config, ours)


def qwen3_vl_moe(directory: Path) -> None:
    """Four experts of which two answer; their weights are transposed, as the hub's are."""
    text = form.text_shape(
        head_dim=form.HEAD_SIZE,
        rope_parameters=rope([6, 5, 5], mrope_interleaved=True),
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        decoder_sparse_step=1,
        norm_topk_prob=True,
    )
    vision = qwen3_vision(deepstack_visual_indexes=[0, 1, 2])
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **token_ids())
    form.save(directory, Qwen3VLMoeForConditionalGeneration, config, processor(Qwen3VLProcessor, Qwen3VLVideoProcessor))
    form.rewrite_weights(directory, _transpose_experts)


def _transpose_experts(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    is_expert = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return name, value.transpose(1, 2) if is_expert else value


def hybrid_text(**others: Any) -> dict[str, Any]:
    """Twelve layers, of which 3, 7 and 11 attend and the others are Gated DeltaNets with heads of 128."""
    return form.text_shape(
        num_hidden_layers=12,
        head_dim=form.HEAD_SIZE,
        rope_parameters=rope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25),
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 3,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        **others,
    )


def hybrid_processor() -> Any:
    """Qwen3-VL's; transformers reads any tokenizer of this family as Qwen3.5's, which knows words only if added."""
    ours = processor(Qwen3VLProcessor, Qwen3VLVideoProcessor)
    ours.tokenizer.add_tokens([f"t{i}" for i in range(4, form.FIRST_SPECIAL)])
    return ours


def qwen3_5(directory: Path) -> None:
    """Three of four layers are recurrent; the tower is Qwen3-VL's without deepstack."""
    config = Qwen3_5Config(text_config=hybrid_text(), vision_config=qwen3_vision(), **token_ids())
    form.save(directory, Qwen3_5ForConditionalGeneration, config, hybrid_processor(), "bfloat16")


def qwen3_5_moe(directory: Path) -> None:
    """Qwen3.5 with four experts of which two answer, beside a shared one."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    text = hybrid_text(shared_expert_intermediate_size=96, **experts)
    config = Qwen3_5MoeConfig(text_config=text, vision_config=qwen3_vision(), **token_ids())
    form.save(directory, Qwen3_5MoeForConditionalGeneration, config, hybrid_processor(), "bfloat16")
