"""LLaVA-NeXT (1.6) and LLaVA-NeXT-Video."""

from typing import Any

from vllm_hidrop.models.family import Family, field
from vllm_hidrop.models.llava import LAYERS, TOWERS, ReducedByClassToken, crops, patches, tower_shape
from vllm_hidrop.plan.grid import Grid, Tile, square
from vllm_hidrop.plan.vision import VisionShape

SHRINKS_ABOVE = 1.1
"""Of the factor by which tiles beyond a budget are shrunk, where there is one."""


class WholeAndTiles(Family):
    """The image whole and in tiles, in a CLIP or SigLIP tower; rows of tiles end with a newline embedding."""

    layers = LAYERS
    towers = TOWERS
    has_tower_kernel = True

    def tokens(self, config: Any) -> int:
        """A square image: whole, and two by two tiles with their newlines."""
        return 5 * patches(config) + 2 * int(patches(config) ** 0.5)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """Of a tile, which has a newline per row at most."""
        return tower_shape(config, patches(config) + int(patches(config) ** 0.5))


class LlavaNext(ReducedByClassToken, WholeAndTiles):
    """The image whole and in tiles; rows of tiles end with a newline embedding, which stays with the image."""

    stock = "LlavaNextForConditionalGeneration"
    title = "LLaVA-NeXT"
    ran = (("llama", "clip_vision_model"),)
    path = "vllm_hidrop.models.llava_model:HidropLlavaNextForConditionalGeneration"

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """The whole image, then the rows of its tiles without the padding, a newline behind each."""
        return whole_and_tiles(feature, config, None)


class LlavaNextVideo(Family):
    """Frames of one pooled tile each; no images."""

    stock = "LlavaNextVideoForConditionalGeneration"
    title = "LLaVA-NeXT-Video"
    layers = LAYERS
    towers = TOWERS
    ran = (("llama", "clip_vision_model"),)
    has_images = False
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

    def grid(self, feature: Any, config: Any) -> Grid:
        """Of a frame."""
        return Grid((square(self.tokens(config)),), is_cropped=crops(config))


def whole_and_tiles(feature: Any, config: Any, most_tiles: int | None) -> Grid | None:
    """The grid of an image whole and in tiles, which are shrunk together where they are more than ``most_tiles``.

    Source: ``_merge_image_patch_embeddings`` and ``_get_num_unpadded_features`` of vLLM's ``llava_next.py`` and
    ``llava_onevision.py``.
    """
    from transformers.image_processing_utils import select_best_resolution

    size = field(feature, "image_sizes")
    if size is None:
        return None
    height, width = size
    base, tile = square(patches(config)), config.vision_config.image_size
    padded = select_best_resolution((height, width), config.image_grid_pinpoints)
    full_rows, full_columns = (side // tile * base.rows for side in padded)
    scale = min(full_rows / height, full_columns / width)
    rows, columns = _unpadded(full_rows, height * scale), _unpadded(full_columns, width * scale)
    right, bottom = (1 + columns / (width * scale)) / 2, (1 + rows / (height * scale)) / 2
    shrink = (rows * columns / (most_tiles * base.end)) ** 0.5 if most_tiles else 1
    if shrink > SHRINKS_ABOVE:
        rows, columns = int(rows // shrink), int(columns // shrink)
    tiles = Tile(base.end, columns, rows, columns + 1, (1 - right, 1 - bottom, right, bottom))
    return Grid((tiles,), base) if tiles.end + 1 == feature.mm_position.length else None


def _unpadded(padded: int, image: float) -> int:
    """Cells of one direction that show the image, which is centred in ``padded`` cells; the cells at its rim stay."""
    return padded - 2 * ((padded - int(round(image, 7))) // 2)
