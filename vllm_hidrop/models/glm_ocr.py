"""GLM-OCR."""

from typing import Any

from vllm_hidrop.models.glm4v import Glm4v
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
        """A gated MLP; a convolution joins patches, a matrix and a gated MLP follow."""
        vision = config.vision_config
        size, out_size = vision.hidden_size, vision.out_hidden_size
        joined = size * vision.spatial_merge_size**2
        return VisionShape(
            num_layers=vision.depth,
            hidden_size=size,
            mlp_weights=3 * size * vision.intermediate_size,
            patch_size=vision.patch_size,
            projector_weights=joined * out_size + out_size**2 + 3 * out_size**2 * vision.in_channels,
            num_channels=vision.in_channels,
            patch_frames=vision.temporal_patch_size,
            merge=vision.spatial_merge_size,
        )
