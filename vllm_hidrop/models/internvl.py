"""InternVL 2.5, 3 and 3.5, in Hugging Face's form and that of the released checkpoints."""

from typing import Any, ClassVar

from vllm_hidrop.models.family import Family
from vllm_hidrop.models.llava import layers_before
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.grid import Grid, square, tiled
from vllm_hidrop.plan.vision import VisionShape

TYPICAL_TILES = 7
"""Two by three, and the whole image."""

SMALL_SIDE = 32
"""Pixels of a side to which tiles and the whole image are shrunk to be compared."""


class InternVL(Family):
    """The image in tiles and whole, one run of tokens; videos have a name before every frame, which is text."""

    stock = "InternVLForConditionalGeneration"
    title = "InternVL3 (Hugging Face form)"
    layers = dict.fromkeys(("qwen2", "qwen3", "llama"), Form.STANDARD)
    towers = ("internvl_vision",)
    ran: ClassVar[tuple[tuple[str, str], ...]] = (("qwen3", "internvl_vision"),)
    has_video = True
    pixels: ClassVar[str] = "pixel_values"

    def tile_tokens(self, config: Any) -> int:
        """Tokens of a tile."""
        return int(config.image_seq_length)

    def tokens(self, config: Any) -> int:
        """A typical number of tiles."""
        return TYPICAL_TILES * self.tile_tokens(config)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """Of a tile."""
        tower = config.vision_config
        side = tower.image_size[0] // tower.patch_size[0]
        return _tower(config, tower.patch_size[0], side, config.vision_feature_layer, self.text_config(config))

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """Tiles in reading order, then the whole image; a frame is one tile.

        vLLM says how many tiles there are. Into how many rows they cut the image is seen from the pixels.
        """
        tokens = self.tile_tokens(config)
        num_tiles = feature.mm_position.get_num_embeds() // tokens
        if feature.modality == "video" or num_tiles == 1:
            return Grid((square(tokens),))
        pixels = (feature.data or {}).get(self.pixels)
        if pixels is None or len(pixels.data) != num_tiles or not getattr(config, "use_thumbnail", True):
            return None
        columns = _columns(pixels.data)
        starts = range(0, (num_tiles - 1) * tokens, tokens)
        whole = square(tokens, (num_tiles - 1) * tokens)
        return None if columns is None else Grid(tiled(starts, columns, tokens), whole)


def _columns(pixels: Any) -> int | None:
    """Tiles in a row, of ``pixels`` [tiles and the whole image, 3, side, side]; None where the pixels do not tell.

    The tiles are put together in every way that fills a rectangle, and compared with the whole image.
    """
    from torch.nn.functional import adaptive_avg_pool2d

    small = adaptive_avg_pool2d(pixels.float(), SMALL_SIDE)
    tiles, whole = small[:-1], small[-1]
    differences = [(float("inf"), 0)]  # where there is one way only
    for columns in (n for n in range(1, len(tiles) + 1) if len(tiles) % n == 0):
        rows = tiles.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # [3, rows, side, columns, side]
        picture = adaptive_avg_pool2d(rows.flatten(1, 2).flatten(2), SMALL_SIDE)
        differences.append((float((picture - whole).square().mean()), columns))
    (least, columns), (next_least, _), *_ = sorted(differences)
    return columns if 2 * least < next_least else None


class InternVLChat(InternVL):
    """The released checkpoints, whose configuration is their own code's."""

    stock = "InternVLChatModel"
    title = "InternVL2.5 / 3 / 3.5"
    layers = {**InternVL.layers, "internlm2": Form.BLACK_BOX}  # noqa: RUF012
    towers = ("intern_vit_6b",)
    ran = (("qwen3", "intern_vit_6b"), ("internlm2", "intern_vit_6b"))
    pixels = "pixel_values_flat"

    def text_config(self, config: Any) -> Any:
        """The text model's part, which older files name otherwise."""
        return getattr(config, "llm_config", None) or config.get_text_config()

    def tile_tokens(self, config: Any) -> int:
        """Tokens of a tile."""
        return int(self._side(config) * config.downsample_ratio) ** 2

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """See :class:`InternVL`; the first version shuffled patches into columns."""
        return None if getattr(config, "ps_version", "v2") == "v1" else super().grid(feature, config)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """Of a tile."""
        patch_size = config.vision_config.patch_size
        return _tower(config, patch_size, self._side(config), config.select_layer, self.text_config(config))

    def _side(self, config: Any) -> int:
        """Patches of a tile's side."""
        return int((config.force_image_size or config.vision_config.image_size) // config.vision_config.patch_size)


def _tower(config: Any, patch_size: int, side: int, feature_layer: int, text_config: Any) -> VisionShape:
    """InternViT on tiles of ``side`` patches a side; patches are joined by pixel shuffle, then two matrices."""
    tower, merge = config.vision_config, round(1 / config.downsample_ratio)
    text_size = text_config.hidden_size
    return VisionShape(
        num_layers=layers_before(feature_layer, tower.num_hidden_layers),
        hidden_size=tower.hidden_size,
        mlp_weights=2 * tower.hidden_size * tower.intermediate_size,
        patch_size=patch_size,
        projector_weights=merge**2 * tower.hidden_size * text_size + text_size**2,
        num_channels=tower.num_channels,
        merge=merge,
        tile_patches=side**2,
        tile_tokens=(side // merge) ** 2,
        num_class_tokens=1,
    )
