"""The table of model families. To add one: write ``models/<family>.py`` and add a row here. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Any

from vllm_hidrop.methods import ModelShape


@dataclass(frozen=True)
class Family:
    """A model architecture that can run staged.

    Attributes:
        stock: vLLM's architecture name.
        staged: our architecture name.
        path: ``module:class`` of the staged model, imported when the engine loads it.
        vision_towers: ``model_type`` of the vision towers it can run with.
        text_models: ``model_type`` of the text models whose decoder layers have the standard form.
    """

    stock: str
    staged: str
    path: str
    vision_towers: tuple[str, ...]
    text_models: tuple[str, ...]

    def check(self, hf_config: Any) -> None:
        """Raise ValueError, which names the part and the supported ones, where a checkpoint cannot run staged."""
        parts = (
            ("vision tower", hf_config.vision_config.model_type, self.vision_towers),
            ("text model", hf_config.text_config.model_type, self.text_models),
        )
        for part, found, known in parts:
            if found not in known:
                raise ValueError(f"{self.stock} with {part} {found!r} cannot run staged; supported: {', '.join(known)}")

    def shape(self, hf_config: Any) -> ModelShape:
        """Layers and tokens per image of a LLaVA-1.5 style configuration."""
        vision = hf_config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        has_class_token = vision.model_type == "clip_vision_model"
        keeps_class_token = has_class_token and hf_config.vision_feature_select_strategy == "full"
        return ModelShape(hf_config.text_config.num_hidden_layers, patches + keeps_class_token)


FAMILIES = {
    family.stock: family
    for family in (
        Family(
            stock="LlavaForConditionalGeneration",
            staged="HidropLlavaForConditionalGeneration",
            path="vllm_hidrop.models.llava:HidropLlavaForConditionalGeneration",
            vision_towers=("clip_vision_model", "siglip_vision_model"),
            text_models=("llama", "mistral", "qwen2"),
        ),
    )
}


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
    raise ValueError(f"{named} is not a family that can run staged; supported: {', '.join(FAMILIES)}")
