"""Tiny checkpoints with random weights, one per model family, that stock vLLM and Hugging Face both load."""

from collections.abc import Mapping

from tests.families.checkpoints import llava, qwen
from tests.families.checkpoints.form import TinyCheckpoint

CHECKPOINTS: Mapping[str, TinyCheckpoint] = {
    "qwen2_vl": qwen.facts(qwen.qwen2_vl),
    "qwen2_5_vl": qwen.facts(qwen.qwen2_5_vl),
    "qwen3_vl": qwen.facts(qwen.qwen3_vl),
    "qwen3_vl_moe": qwen.facts(qwen.qwen3_vl_moe),
    "llava_next": llava.LLAVA_NEXT,
}
"""By the name of the family, which is the configuration's ``model_type`` where there is one."""
