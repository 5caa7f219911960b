"""Qwen2-VL and Qwen2.5-VL."""

from typing import Any

from vllm_hidrop.models.family import Family, merged_grid, square_tokens
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.grid import Grid


class Qwen2VL(Family):
    """Images of any size, M-RoPE; a video is one run of frames, which its grid divides."""

    stock = "Qwen2VLForConditionalGeneration"
    title = "Qwen2-VL"
    layers = {"qwen2_vl_text": Form.STANDARD}  # noqa: RUF012
    towers = ("qwen2_vl", "qwen2_vl_vision")
    has_video = True

    def tokens(self, config: Any) -> int:
        """A square image."""
        vision = config.vision_config
        return square_tokens(vision.patch_size, vision.spatial_merge_size)

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """Merged patches, row by row."""
        return merged_grid(feature, config.vision_config.spatial_merge_size)


class Qwen25VL(Qwen2VL):
    """The same with window attention in the tower."""

    stock = "Qwen2_5_VLForConditionalGeneration"
    title = "Qwen2.5-VL"
    layers = {"qwen2_5_vl_text": Form.STANDARD}  # noqa: RUF012
    towers = ("qwen2_5_vl", "qwen2_5_vl_vision")
