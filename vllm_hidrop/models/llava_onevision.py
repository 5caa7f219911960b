"""LLaVA-OneVision."""

from math import ceil
from typing import Any

from vllm_hidrop.models.llava import patches
from vllm_hidrop.models.llava_next import WholeAndTiles, whole_and_tiles
from vllm_hidrop.plan.grid import Grid, square

MOST_TILES = 9
"""Of whose cells an image may have as many; vLLM knows no other budget."""


class LlavaOnevision(WholeAndTiles):
    """As LLaVA-NeXT, tiles beyond a budget shrunk together; a video's frames are projected, then pooled."""

    stock = "LlavaOnevisionForConditionalGeneration"
    title = "LLaVA-OneVision"
    ran = (("qwen2", "siglip_vision_model"),)
    has_video = True

    def frame_tokens(self, config: Any) -> int:
        """Patches pooled two by two."""
        return ceil(patches(config) ** 0.5 / 2) ** 2

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """As LLaVA-NeXT's, with at most nine tiles' cells; of a frame, pooled cells."""
        if feature.modality == "video":
            return Grid((square(self.frame_tokens(config)),))
        return whole_and_tiles(feature, config, most_tiles=MOST_TILES)
