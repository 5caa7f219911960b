"""LLaVA-1.5."""

from typing import Any

from vllm_hidrop.methods.adaptive import EncoderReduction
from vllm_hidrop.models.family import Family
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.grid import Grid, square
from vllm_hidrop.plan.vision import VisionShape

LAYERS = dict.fromkeys(("llama", "mistral", "qwen2"), Form.STANDARD)
TOWERS = ("clip_vision_model", "siglip_vision_model")


class ReducedByClassToken(Family):
    """A family whose tower's class token ranks patches, where it has one."""

    reducible_towers = ("clip_vision_model",)

    def no_reduction(self, config: Any) -> str | None:
        """The class token ranks patches."""
        if config.vision_config.model_type in self.reducible_towers:
            return None
        return "it needs a vision tower whose class token ranks the patches, as CLIP's does"

    def check_reduction(self, config: Any, reduction: EncoderReduction) -> None:
        """It needs features that are one layer's patches."""
        is_one_layer = isinstance(config.vision_feature_layer, int)
        if not (is_one_layer and config.vision_feature_select_strategy == "default"):
            raise ValueError("one feature layer is needed, its patches alone")
        reduction.check(patches(config))


class Llava(ReducedByClassToken):
    """A CLIP or SigLIP tower at one size, two projections, and a Llama, Mistral or Qwen2 text model."""

    stock = "LlavaForConditionalGeneration"
    title = "LLaVA-1.5"
    layers = LAYERS
    towers = TOWERS
    is_dynamic = False
    has_tower_kernel = True
    ran = (
        ("llama", "clip_vision_model"),
        ("mistral", "clip_vision_model"),
        ("qwen2", "clip_vision_model"),
        ("qwen2", "siglip_vision_model"),
    )
    ran_trained = (("llama", "clip_vision_model"),)
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
        """Of one tile."""
        return tower_shape(config, self.tokens(config))


def tower_shape(config: Any, tile_tokens: int, merge: int = 1) -> VisionShape:
    """CLIP's or SigLIP's tower up to the last layer that is read, and two projections; see ``VisionShape``."""
    tower, text_size = config.vision_config, config.get_text_config().hidden_size
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    return VisionShape(
        num_layers=max(layers_before(layer, tower.num_hidden_layers) for layer in chosen),
        hidden_size=tower.hidden_size,
        mlp_weights=2 * tower.hidden_size * tower.intermediate_size,
        patch_size=tower.patch_size,
        projector_weights=tower.hidden_size * len(chosen) * text_size + text_size**2,
        num_channels=tower.num_channels,
        merge=merge,
        tile_patches=patches(config),
        tile_tokens=tile_tokens,
        num_class_tokens=int(tower.model_type == "clip_vision_model"),
    )


def layers_before(output: int, num_layers: int) -> int:
    """Layers that make an output, as Hugging Face counts: 0 is the patch embedding, -1 the last layer's."""
    return output if output >= 0 else num_layers + 1 + output


def patches(config: Any) -> int:
    """Patches of the tower's one image size."""
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2


def crops(config: Any) -> bool:
    """Whether the tower sees the centre square of a picture: CLIP's processors cut it, SigLIP's squeeze the picture."""
    return bool(config.vision_config.model_type == "clip_vision_model")
