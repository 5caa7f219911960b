"""Tiny checkpoints with random weights, one per model family, that stock vLLM and Hugging Face both load."""

from collections.abc import Mapping

from tests.families.checkpoints import glm, glm_ocr, internvl, internvl_chat, llava, mistral, qwen, smolvlm
from tests.families.checkpoints.form import TinyCheckpoint
from vllm_hidrop.verify.tiny_qwen import qwen3_vl

CHECKPOINTS: Mapping[str, TinyCheckpoint] = {
    "qwen2_vl": qwen.facts(qwen.qwen2_vl),
    "qwen2_5_vl": qwen.facts(qwen.qwen2_5_vl),
    "qwen3_vl": qwen.facts(qwen3_vl),
    "qwen3_vl_moe": qwen.facts(qwen.qwen3_vl_moe),
    "llava_next": llava.LLAVA_NEXT,
    "llava_next_video": llava.LLAVA_NEXT_VIDEO,
    "llava_onevision": llava.LLAVA_ONEVISION,
    "internvl": internvl.INTERNVL,
    "internvl_chat": internvl_chat.facts(internvl_chat.qwen3, has_video=True),
    "internvl_chat_internlm2": internvl_chat.facts(internvl_chat.internlm2, has_video=False),
    "mistral3": mistral.MISTRAL3,
    "glm4v": glm.facts(glm.glm4v),
    "glm4v_moe": glm.facts(glm.glm4v_moe),
    "glm_ocr": glm.facts(glm_ocr.glm_ocr),
    "idefics3": smolvlm.facts(smolvlm.idefics3),
    "smolvlm": smolvlm.facts(smolvlm.smolvlm),
    "qwen3_5": qwen.facts(qwen.qwen3_5, dtype="bfloat16", tolerance=0.15, num_layers=12),
    "qwen3_5_moe": qwen.facts(qwen.qwen3_5_moe, dtype="bfloat16", tolerance=0.6, num_layers=12),
}
"""By the name of the family, which is the configuration's ``model_type`` where there is one."""
