"""LLaVA-OneVision."""

from math import ceil
from typing import Any

from vllm_hidrop.models.family import Family
from vllm_hidrop.models.llava import LAYERS, TOWERS, patches, tower_shape
from vllm_hidrop.models.llava_next import whole_and_tiles
from vllm_hidrop.plan.grid import Grid, square
from vllm_hidrop.plan.vision import VisionShape

MOST_TILES = 9
"""Of whose cells an image may have as many; vLLM knows no other budget."""


class LlavaOnevision(Family):
    """As LLaVA-NeXT, tiles beyond a budget shrunk together; a video's frames are pooled, one newline ends them all."""

    stock = "LlavaOnevisionForConditionalGeneration"
    title = "LLaVA-OneVision"
    layers = LAYERS
    towers = TOWERS
    ran = (("qwen2", "siglip_vision_model"),)
    has_video = True
    has_tower_kernel = True

    def tokens(self, config: Any) -> int:
        """A square image: whole, and two by two tiles with their newlines."""
        return 5 * patches(config) + 2 * int(patches(config) ** 0.5)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """Of a tile, which has a newline per row at most; frames are projected before they are pooled."""
        return tower_shape(config, patches(config) + int(patches(config) ** 0.5))

    def frame_tokens(self, config: Any) -> int:
        """Patches pooled two by two."""
        return ceil(patches(config) ** 0.5 / 2) ** 2

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """As LLaVA-NeXT's, with at most nine tiles' cells; of a frame, pooled cells."""
        if feature.modality == "video":
            return Grid((square(self.frame_tokens(config)),))
        return whole_and_tiles(feature, config, most_tiles=MOST_TILES)
