"""InternVL 2.5, 3 and 3.5, in Hugging Face's form and that of the released checkpoints."""

from typing import Any

from vllm_hidrop.models.family import Family
from vllm_hidrop.models.llava import layers_before
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.vision import VisionShape

TYPICAL_TILES = 7
"""Two by three, and the whole image."""


class InternVL(Family):
    """The image in tiles and whole, one run of tokens; videos have a name before every frame, which is text."""

    stock = "InternVLForConditionalGeneration"
    title = "InternVL3 (Hugging Face form)"
    layers = dict.fromkeys(("qwen2", "qwen3", "llama"), Form.STANDARD)
    towers = ("internvl_vision",)
    has_video = True

    def tokens(self, config: Any) -> int:
        """A typical number of tiles."""
        return TYPICAL_TILES * int(config.image_seq_length)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """Of a tile."""
        tower = config.vision_config
        side = tower.image_size[0] // tower.patch_size[0]
        return _tower(config, tower.patch_size[0], side, config.vision_feature_layer, self.text_config(config))


class InternVLChat(Family):
    """The released checkpoints, whose configuration is their own code's."""

    stock = "InternVLChatModel"
    title = "InternVL2.5 / 3 / 3.5"
    layers = {**InternVL.layers, "internlm2": Form.BLACK_BOX}  # noqa: RUF012
    towers = ("intern_vit_6b",)
    has_video = True

    def text_config(self, config: Any) -> Any:
        """The text model's part, which older files name otherwise."""
        return getattr(config, "llm_config", None) or config.get_text_config()

    def tokens(self, config: Any) -> int:
        """A typical number of tiles."""
        return TYPICAL_TILES * int(self._side(config) * config.downsample_ratio) ** 2

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
