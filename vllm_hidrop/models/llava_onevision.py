"""LLaVA-OneVision."""

from math import ceil
from typing import Any

from vllm_hidrop.models.family import Family
from vllm_hidrop.models.llava import LAYERS, TOWERS, patches, tower_shape
from vllm_hidrop.plan.vision import VisionShape


class LlavaOnevision(Family):
    """As LLaVA-NeXT, tiles beyond a budget shrunk together; a video's frames are pooled, one newline ends them all."""

    stock = "LlavaOnevisionForConditionalGeneration"
    title = "LLaVA-OneVision"
    layers = LAYERS
    towers = TOWERS
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
