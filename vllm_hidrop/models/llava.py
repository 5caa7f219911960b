"""LLaVA-1.5."""

from typing import Any

from vllm_hidrop.methods.adaptive import EncoderReduction
from vllm_hidrop.models.family import Family
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.grid import Grid, square
from vllm_hidrop.plan.shapes import VisionShape, text_shape, vision_shape

LAYERS = dict.fromkeys(("llama", "mistral", "qwen2"), Form.STANDARD)
TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(Family):
    """A CLIP or SigLIP tower at one size, two projections, and a Llama, Mistral or Qwen2 text model."""

    stock = "LlavaForConditionalGeneration"
    title = "LLaVA-1.5"
    layers = LAYERS
    towers = TOWERS
    is_dynamic = False
    has_tower_kernel = True
    path = "vllm_hidrop.models.llava_model:HidropLlavaForConditionalGeneration"

    def tokens(self, config: Any) -> int:
        """The tower's patches, and the class token where the features have it."""
        has_class_token = config.vision_config.model_type == "clip_vision_model"
        return patches(config) + (has_class_token and config.vision_feature_select_strategy == "full")

    def grid(self, feature: Any, config: Any) -> Grid | None:
        """The tower's patches, behind the class token where the features have it."""
        if feature.mm_position.length != self.tokens(config):  # features that a client sent
            return None
        num_patches = patches(config)
        return Grid((square(num_patches, self.tokens(config) - num_patches),), is_cropped=crops(config))

    def vision_shape(self, config: Any) -> VisionShape | None:
        """CLIP's or SigLIP's, up to the feature layer."""
        return vision_shape(config, text_shape(self.text_config(config)))

    def check_reduction(self, config: Any, reduction: EncoderReduction) -> None:
        """It needs a class token, and features that are one layer's patches."""
        check_reduction(config, reduction)


def check_reduction(config: Any, reduction: EncoderReduction) -> None:
    """Raise ValueError, which names what is missing, where CLIP or SigLIP cannot run a reduction of its one size."""
    has_class_token = config.vision_config.model_type == "clip_vision_model"
    is_one_layer = isinstance(config.vision_feature_layer, int)
    if has_class_token and not (is_one_layer and config.vision_feature_select_strategy == "default"):
        raise ValueError("one feature layer is needed, its patches alone")
    reduction.check(patches(config), has_class_token)


def patches(config: Any) -> int:
    """Patches of the tower's one image size."""
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2


def crops(config: Any) -> bool:
    """Whether the tower sees the centre square of a picture: CLIP's processors cut it, SigLIP's squeeze the picture."""
    return bool(config.vision_config.model_type == "clip_vision_model")
