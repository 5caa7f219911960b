"""The table of model families. To add one: write ``models/<family>.py`` and add a row here. Imports nothing heavy."""

from vllm_hidrop.models.family import Family
from vllm_hidrop.models.glm4v import Glm4v, Glm4vMoe
from vllm_hidrop.models.glm_ocr import GlmOcr
from vllm_hidrop.models.idefics3 import Idefics3, SmolVLM
from vllm_hidrop.models.internvl import InternVL, InternVLChat
from vllm_hidrop.models.llava import Llava
from vllm_hidrop.models.llava_next import LlavaNext, LlavaNextVideo
from vllm_hidrop.models.llava_onevision import LlavaOnevision
from vllm_hidrop.models.mistral3 import Mistral3
from vllm_hidrop.models.qwen3_5 import Qwen35, Qwen35Moe
from vllm_hidrop.models.qwen3_vl import Qwen3VL, Qwen3VLMoe
from vllm_hidrop.models.qwen_vl import Qwen2VL, Qwen25VL

FAMILIES: dict[str, Family] = {
    family.stock: family
    for family in (
        Llava(),
        LlavaNext(),
        LlavaNextVideo(),
        LlavaOnevision(),
        Qwen2VL(),
        Qwen25VL(),
        Qwen3VL(),
        Qwen3VLMoe(),
        Qwen35(),
        Qwen35Moe(),
        InternVL(),
        InternVLChat(),
        Mistral3(),
        Glm4v(),
        Glm4vMoe(),
        GlmOcr(),
        Idefics3(),
        SmolVLM(),
    )
}
UNSUPPORTED = {
    "Gemma3ForConditionalGeneration": "an image's rows attend both ways, by their places in the full prompt",
    "Gemma4ForConditionalGeneration": "layers take inputs of their own for every row, and share KV caches",
    "KimiVLForConditionalGeneration": "its layers cache latents, not keys (MLA)",
    "Phi4MMForCausalLM": "an adapter (LoRA) runs on an image's rows",
}
"""Architectures that people ask for, and why they cannot run staged."""


def hidrop_architecture(stock_architecture: str) -> str | None:
    """Our architecture name for vLLM's; None when the architecture cannot run staged."""
    family = FAMILIES.get(stock_architecture)
    return family.staged if family else None


def family_of(architecture: str | None) -> Family:
    """The family of an architecture, by vLLM's name or ours; None where a configuration names none.

    Raises:
        ValueError: it cannot run staged.
    """
    for family in FAMILIES.values():
        if architecture in (family.stock, family.staged):
            return family
    named = architecture or "a model that names no architecture"
    titles = ", ".join(family.title for family in FAMILIES.values())
    why = f" ({UNSUPPORTED[named]})" if named in UNSUPPORTED else ""
    raise ValueError(f"{named} is not a family that can run staged{why}; supported: {titles}")
