"""Mistral-Small 3 and Pixtral in Hugging Face's form."""

from itertools import pairwise
from typing import Any

from vllm_hidrop.models.family import Family, square_tokens
from vllm_hidrop.models.llava import layers_before
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.grid import Grid, Tile
from vllm_hidrop.plan.vision import VisionShape


class Mistral3(Family):
    """Images of any size; the break behind every row of patches stays with the image, its end is text."""

    stock = "Mistral3ForConditionalGeneration"
    title = "Mistral-Small 3"
    layers = dict.fromkeys(("mistral", "ministral3"), Form.STANDARD)
    towers = ("pixtral",)
    ran = (("mistral", "pixtral"),)

    def tokens(self, config: Any) -> int:
        """A square image, without breaks."""
        return square_tokens(config.vision_config.patch_size, config.spatial_merge_size)

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """A row of cells is a run of embeddings, a break is between."""
        rows = feature.mm_position.extract_embeds_range()
        columns = {end - start + 1 for start, end in rows}
        strides = {later - start for (start, _), (later, _) in pairwise(rows)}
        if len(columns) != 1 or len(strides) > 1:
            return None
        width = columns.pop()
        return Grid((Tile(0, width, len(rows), strides.pop() if strides else width),))

    def vision_shape(self, config: Any) -> VisionShape | None:
        """A gated MLP; a matrix joins patches, two project them."""
        tower, merge = config.vision_config, config.spatial_merge_size
        size, text_size = tower.hidden_size, self.text_config(config).hidden_size
        return VisionShape(
            num_layers=layers_before(config.vision_feature_layer, tower.num_hidden_layers),
            hidden_size=size,
            mlp_weights=3 * size * tower.intermediate_size,
            patch_size=tower.patch_size,
            projector_weights=merge**2 * size**2 + size * text_size + text_size**2,
            num_channels=tower.num_channels,
            merge=merge,
        )
