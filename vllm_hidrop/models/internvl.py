"""InternVL 2.5, 3 and 3.5, in Hugging Face's form and that of the released checkpoints."""

from typing import Any

from vllm_hidrop.models.family import Family
from vllm_hidrop.plan.form import Form

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
        side = (config.force_image_size or config.vision_config.image_size) // config.vision_config.patch_size
        return TYPICAL_TILES * int(side * config.downsample_ratio) ** 2
