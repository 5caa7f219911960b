"""LLaVA-NeXT (1.6) and LLaVA-NeXT-Video."""

from typing import Any

from vllm_hidrop.models.family import Family
from vllm_hidrop.models.llava import LAYERS, TOWERS, patches, tower_shape
from vllm_hidrop.plan.vision import VisionShape


class LlavaNext(Family):
    """The image whole and in tiles; rows of tiles end with a newline embedding, which stays with the image."""

    stock = "LlavaNextForConditionalGeneration"
    title = "LLaVA-NeXT"
    layers = LAYERS
    towers = TOWERS
    has_tower_kernel = True

    def tokens(self, config: Any) -> int:
        """A square image: whole, and two by two tiles with their newlines."""
        return 5 * patches(config) + 2 * int(patches(config) ** 0.5)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """Of a tile, which has a newline per row at most."""
        return tower_shape(config, patches(config) + int(patches(config) ** 0.5))


class LlavaNextVideo(Family):
    """Frames of one pooled tile each; no images."""

    stock = "LlavaNextVideoForConditionalGeneration"
    title = "LLaVA-NeXT-Video"
    layers = LAYERS
    towers = TOWERS
    has_video = True
    has_tower_kernel = True

    def tokens(self, config: Any) -> int:
        """Of a frame."""
        return patches(config) // config.spatial_pool_stride**2

    def frame_tokens(self, config: Any) -> int:
        """All the same."""
        return self.tokens(config)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """Of a frame, which is pooled before it is projected."""
        return tower_shape(config, self.tokens(config), config.spatial_pool_stride)
