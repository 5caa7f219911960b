"""The image processor of the converted model, as data. Reads no file.

``image_aspect_ratio`` "pad" is transformers' LlavaImageProcessor with ``do_pad``: the image is padded to a square with
the mean colour, as LLaVA does, then resized. Hugging Face's own conversion of LLaVA-1.5 crops instead. Other values are
CLIP's processor: the shorter side is resized, the centre kept.

**Differs** transformers resizes with torchvision on tensors, LLaVA with Pillow: bicubic and antialiased both, they
differ by rounding.
"""

from collections.abc import Mapping
from typing import Any

from vllm_hidrop.lab.convert.original import Tower
from vllm_hidrop.lab.convert.tokens import IMAGE_TOKEN

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
BICUBIC = 3


def image_processor(tower: Tower, config: Any) -> dict[str, Any]:
    """What ``preprocessor_config.json`` holds."""
    side = config.vision_config.image_size
    pads = config.image_aspect_ratio == "pad"
    given: Mapping[str, Any] = tower.processor
    return {
        "image_processor_type": "LlavaImageProcessor" if pads else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        **({"do_pad": True} if pads else {}),
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": given.get("image_mean", CLIP_MEAN),
        "image_std": given.get("image_std", CLIP_STD),
        "do_convert_rgb": True,
    }


def processor(config: Any) -> dict[str, Any]:
    """What ``processor_config.json`` holds; the one additional token is CLIP's class token."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": config.vision_config.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
