"""GLM-4.1V and GLM-4.5V."""

from typing import Any

from vllm_hidrop.models.family import Family, merged_grid, square_tokens
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.grid import Grid


class Glm4v(Family):
    """Images of any size, M-RoPE, sandwich norms; timestamps between a video's frames are text."""

    stock = "Glm4vForConditionalGeneration"
    title = "GLM-4.1V"
    layers = {"glm4v_text": Form.BLACK_BOX}  # noqa: RUF012
    towers = ("glm4v", "glm4v_vision")
    has_video = True

    def tokens(self, config: Any) -> int:
        """A square image."""
        vision = config.vision_config
        return square_tokens(vision.patch_size, vision.spatial_merge_size)

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """Merged patches, row by row."""
        return merged_grid(feature, config.vision_config.spatial_merge_size)


class Glm4vMoe(Glm4v):
    """With experts, and norms in the usual places."""

    stock = "Glm4vMoeForConditionalGeneration"
    title = "GLM-4.5V"
    layers = {"glm4v_moe_text": Form.STANDARD}  # noqa: RUF012
    towers = ("glm4v_moe", "glm4v_moe_vision")
