"""The code that an InternVL checkpoint of the released form brings: its configuration, and InternLM2's.

Copied into the checkpoint's folder, so it imports nothing but transformers. Fields and defaults are those of the
released checkpoints, as far as vLLM reads them.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


class InternVisionConfig(PreTrainedConfig):
    """InternViT's."""

    model_type = "intern_vit_6b"

    def __init__(self, **fields: Any) -> None:
        defaults = {
            "num_channels": 3,
            "qkv_bias": False,
            "qk_normalization": False,
            "hidden_act": "gelu",
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            "initializer_factor": 0.1,
        }
        super().__init__(**(defaults | fields))


class InternLM2Config(PreTrainedConfig):
    """InternLM2's, which transformers does not have."""

    model_type = "internlm2"


class InternVLChatConfig(PreTrainedConfig):
    """Of the whole; the text model's part is ``llm_config``."""

    model_type = "internvl_chat"

    def __init__(
        self,
        *,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        select_layer: int = -1,
        force_image_size: int | None = None,
        downsample_ratio: float = 0.5,
        dynamic_image_size: bool = True,
        use_thumbnail: bool = True,
        ps_version: str = "v2",
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 6,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        text = {"model_type": "internlm2"} | (llm_config or {})
        text_class = InternLM2Config if text["model_type"] == "internlm2" else CONFIG_MAPPING[text["model_type"]]
        self.llm_config = text_class(**{name: value for name, value in text.items() if name != "model_type"})
        self.select_layer = select_layer
        self.force_image_size = force_image_size
        self.downsample_ratio = downsample_ratio
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.ps_version = ps_version
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
