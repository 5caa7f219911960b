"""Mistral-Small 3 and Pixtral in Hugging Face's form."""

from typing import Any

from vllm_hidrop.models.family import Family, square_tokens
from vllm_hidrop.plan.form import Form


class Mistral3(Family):
    """Images of any size; the break behind every row of patches stays with the image, its end is text."""

    stock = "Mistral3ForConditionalGeneration"
    title = "Mistral-Small 3"
    layers = dict.fromkeys(("mistral", "ministral3"), Form.STANDARD)
    towers = ("pixtral",)

    def tokens(self, config: Any) -> int:
        """A square image, without breaks."""
        return square_tokens(config.vision_config.patch_size, config.spatial_merge_size)
