"""GLM-OCR."""

from typing import Any

from vllm_hidrop.models.glm4v import Glm4v, glm_tower
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.vision import VisionShape


class GlmOcr(Glm4v):
    """As GLM-4.1V, with another tower."""

    stock = "GlmOcrForConditionalGeneration"
    title = "GLM-OCR"
    layers = {"glm_ocr_text": Form.BLACK_BOX}  # noqa: RUF012
    towers = ("glm_ocr", "glm_ocr_vision")
    ran = (("glm_ocr_text", "glm_ocr_vision"),)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """A tower's MLP has the configuration's size, the merger's as many times the output's as there are channels."""
        vision = config.vision_config
        return glm_tower(vision, vision.intermediate_size, merger_size=vision.out_hidden_size * vision.in_channels)
