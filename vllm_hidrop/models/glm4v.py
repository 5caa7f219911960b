"""GLM-4.1V and GLM-4.5V."""

from typing import Any

from vllm_hidrop.models.family import MergedPatches
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.vision import VisionShape


class Glm4v(MergedPatches):
    """Images of any size, M-RoPE, sandwich norms; timestamps between a video's frames are text."""

    stock = "Glm4vForConditionalGeneration"
    title = "GLM-4.1V"
    layers = {"glm4v_text": Form.BLACK_BOX}  # noqa: RUF012
    towers = ("glm4v", "glm4v_vision")
    ran = (("glm4v_text", "glm4v_vision"),)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """A tower's MLP has the size of the output, the merger's that of the configuration."""
        vision = config.vision_config
        return glm_tower(vision, mlp_size=vision.out_hidden_size, merger_size=vision.intermediate_size)


def glm_tower(vision: Any, mlp_size: int, merger_size: int) -> VisionShape:
    """A tower with gated MLPs; a convolution joins patches, a matrix and a gated MLP of ``merger_size`` follow."""
    size, out_size = vision.hidden_size, vision.out_hidden_size
    joined = size * vision.spatial_merge_size**2
    return VisionShape(
        num_layers=vision.depth,
        hidden_size=size,
        mlp_weights=3 * size * mlp_size,
        patch_size=vision.patch_size,
        projector_weights=joined * out_size + out_size**2 + 3 * out_size * merger_size,
        num_channels=vision.in_channels,
        patch_frames=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
    )


class Glm4vMoe(Glm4v):
    """With experts, and norms in the usual places."""

    stock = "Glm4vMoeForConditionalGeneration"
    title = "GLM-4.5V"
    layers = {"glm4v_moe_text": Form.STANDARD}  # noqa: RUF012
    towers = ("glm4v_moe", "glm4v_moe_vision")
    ran = (("glm4v_moe_text", "glm4v_moe_vision"),)
