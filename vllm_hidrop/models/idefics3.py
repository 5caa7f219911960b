"""Idefics3 and SmolVLM."""

from typing import Any

from vllm_hidrop.models.family import Family
from vllm_hidrop.models.llava import patches
from vllm_hidrop.plan.form import Form

TYPICAL_TILES = 13
"""Three by four, and the whole image."""


class Idefics3(Family):
    """The image in tiles and whole; the text between tiles stays with the image."""

    stock = "Idefics3ForConditionalGeneration"
    title = "Idefics3"
    layers = {"llama": Form.STANDARD}  # noqa: RUF012
    towers = ("idefics3", "idefics3_vision")

    def tokens(self, config: Any) -> int:
        """A typical number of tiles."""
        return TYPICAL_TILES * patches(config) // int(config.scale_factor) ** 2

    def text_model(self, model: Any) -> Any:
        """The text model has no head of its own."""
        return model.model.text_model


class SmolVLM(Idefics3):
    """The same, smaller."""

    stock = "SmolVLMForConditionalGeneration"
    title = "SmolVLM"
    towers = ("smolvlm", "smolvlm_vision")
