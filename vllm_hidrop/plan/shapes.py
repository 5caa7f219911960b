"""The sizes in a Hugging Face configuration, as `vllm_hidrop.plan.costs` counts by them.

Reads attributes; imports neither transformers nor vLLM.
"""

from typing import Any

from vllm_hidrop.plan.costs import TextShape, VisionShape


def text_shape(config: Any) -> TextShape:
    """Sizes of a Hugging Face text configuration."""
    heads = config.num_attention_heads
    return TextShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
    )


def vision_shape(config: Any, text: TextShape) -> VisionShape | None:
    """Sizes of LLaVA's CLIP or SigLIP tower as it runs, and of its projector; None for other towers."""
    tower = config.vision_config
    num_class_tokens = {"clip_vision_model": 1, "siglip_vision_model": 0}.get(tower.model_type)
    if num_class_tokens is None:
        return None
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    # Layer 0 is the patch embedding, so -1 is the last of num_hidden_layers + 1 outputs.
    last = max(layer if layer >= 0 else tower.num_hidden_layers + 1 + layer for layer in chosen)
    num_patches = (tower.image_size // tower.patch_size) ** 2
    return VisionShape(
        num_layers=last,
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        patch_size=tower.patch_size,
        num_patches=num_patches,
        num_tokens=num_patches + num_class_tokens,
        projector_input_size=tower.hidden_size * len(chosen),
        text_hidden_size=text.hidden_size,
        num_channels=tower.num_channels,
    )
