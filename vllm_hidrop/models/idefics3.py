"""Idefics3 and SmolVLM."""

from itertools import pairwise
from typing import Any

from vllm_hidrop.models.family import Family
from vllm_hidrop.models.llava import patches
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.grid import Grid, square, tiled
from vllm_hidrop.plan.vision import VisionShape

TYPICAL_TILES = 13
"""Three by four, and the whole image."""


class Idefics3(Family):
    """The image in tiles and whole; the text between tiles stays with the image."""

    stock = "Idefics3ForConditionalGeneration"
    title = "Idefics3"
    layers = {"llama": Form.STANDARD}  # noqa: RUF012
    towers = ("idefics3", "idefics3_vision")
    ran = (("llama", "idefics3_vision"),)

    def tokens(self, config: Any) -> int:
        """A typical number of tiles."""
        return TYPICAL_TILES * patches(config) // int(config.scale_factor) ** 2

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """Tiles and the whole image, a run of embeddings each; the text before a row of tiles has a line's end, too."""
        position = feature.mm_position
        runs = position.extract_embeds_range()
        first, last = runs[0]
        tokens = last - first + 1
        gaps = [start - end - 1 for (_, end), (start, _) in pairwise(runs)]
        columns = next((tile for tile, gap in enumerate(gaps, 1) if gap > first - position.offset), None)
        *tiles, whole = (start - first for start, _ in runs)
        if not tiles:
            return Grid((square(tokens),))
        if columns is None or len(tiles) % columns:
            return None
        return Grid(tiled(tiles, columns, tokens), square(tokens, whole))

    def vision_shape(self, config: Any) -> VisionShape | None:
        """SigLIP's on tiles of one size; patches are joined by pixel shuffle, then one matrix."""
        tower, merge = config.vision_config, int(config.scale_factor)
        return VisionShape(
            num_layers=tower.num_hidden_layers,
            hidden_size=tower.hidden_size,
            mlp_weights=2 * tower.hidden_size * tower.intermediate_size,
            patch_size=tower.patch_size,
            projector_weights=merge**2 * tower.hidden_size * self.text_config(config).hidden_size,
            num_channels=tower.num_channels,
            merge=merge,
            tile_patches=patches(config),
            tile_tokens=patches(config) // merge**2,
        )

    def text_model(self, model: Any) -> Any:
        """The text model has no head of its own."""
        return model.model.text_model


class SmolVLM(Idefics3):
    """The same, smaller."""

    stock = "SmolVLMForConditionalGeneration"
    title = "SmolVLM"
    towers = ("smolvlm", "smolvlm_vision")
    ran = (("llama", "smolvlm_vision"),)
