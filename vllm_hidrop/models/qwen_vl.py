"""Qwen2-VL and Qwen2.5-VL."""

from dataclasses import replace
from typing import Any

from vllm_hidrop.models.family import MergedPatches
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.vision import VisionShape


class Qwen2VL(MergedPatches):
    """Images of any size, M-RoPE; a video is one run of frames, which its grid divides."""

    stock = "Qwen2VLForConditionalGeneration"
    title = "Qwen2-VL"
    layers = {"qwen2_vl_text": Form.STANDARD}  # noqa: RUF012
    towers = ("qwen2_vl", "qwen2_vl_vision")
    ran = (("qwen2_vl_text", "qwen2_vl_vision"),)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """A plain MLP; all patches of a frame attend to each other."""
        vision = config.vision_config
        mlp_size = int(vision.embed_dim * vision.mlp_ratio)
        return merging_tower(vision, vision.embed_dim, 2 * vision.embed_dim * mlp_size, vision.hidden_size)


class Qwen25VL(Qwen2VL):
    """The same with window attention in the tower."""

    stock = "Qwen2_5_VLForConditionalGeneration"
    title = "Qwen2.5-VL"
    layers = {"qwen2_5_vl_text": Form.STANDARD}  # noqa: RUF012
    towers = ("qwen2_5_vl", "qwen2_5_vl_vision")
    ran = (("qwen2_5_vl_text", "qwen2_5_vl_vision"),)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """A gated MLP; window attention in all but a few layers."""
        vision = config.vision_config
        size = vision.hidden_size
        token_size = vision.patch_size * vision.spatial_merge_size  # windows are whole tokens
        window_side = vision.window_size // token_size * vision.spatial_merge_size
        return replace(
            merging_tower(vision, size, 3 * size * vision.intermediate_size, vision.out_hidden_size),
            window_patches=window_side**2,
            num_window_layers=vision.depth - len(vision.fullatt_block_indexes),
        )


def merging_tower(vision: Any, hidden_size: int, mlp_weights: int, text_size: int, num_mergers: int = 1) -> VisionShape:
    """A Qwen-VL tower; a merger is two matrices, behind ``spatial_merge_size`` squared patches that become one row."""
    merged = hidden_size * vision.spatial_merge_size**2
    return VisionShape(
        num_layers=vision.depth,
        hidden_size=hidden_size,
        mlp_weights=mlp_weights,
        patch_size=vision.patch_size,
        projector_weights=num_mergers * (merged**2 + merged * text_size),
        num_channels=vision.in_channels,
        patch_frames=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
    )
