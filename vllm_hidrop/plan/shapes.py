"""The sizes of a model's layers, from its Hugging Face configuration, and their FLOPs.

A multiply-add counts as 2 FLOPs. Norms, activations, RoPE, softmax and sampling are left out.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextShape:
    """Sizes of a Llama-like decoder with gated MLP and grouped-query attention; K and V in float16 or bfloat16."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    kv_bytes_per_element: int = 2

    @property
    def kv_bytes_per_row(self) -> int:
        """Bytes of one row's K and V in one layer."""
        return 2 * self.num_kv_heads * self.head_size * self.kv_bytes_per_element

    @property
    def qkv_flops_per_row(self) -> int:
        """FLOPs of one row's Q, K and V projections in one layer: ``2 C (H + 2 G) D``."""
        heads = self.num_heads + 2 * self.num_kv_heads
        return 2 * self.hidden_size * heads * self.head_size

    def layer_flops(self, rows: int) -> int:
        """FLOPs of one decoder layer that prefills ``rows`` rows.

        ``T (2 C (H + 2 G) D + 2 H D C + 6 C M) + 4 H D T (T + 1) / 2`` with T rows, C hidden size, H query heads,
        G KV heads, D head size, M the MLP's size: 2 per weight and row for Q, K, V, output and the three MLP matrices;
        then, causally, ``Q K^T`` and the sum over V.
        """
        width = self.num_heads * self.head_size
        output_and_mlp = 2 * width * self.hidden_size + 6 * self.hidden_size * self.intermediate_size
        attention = 2 * width * rows * (rows + 1)
        return rows * (self.qkv_flops_per_row + output_and_mlp) + attention

    @property
    def lm_head_flops(self) -> int:
        """FLOPs of the one row whose logits prefill needs: ``2 C vocabulary``."""
        return 2 * self.hidden_size * self.vocab_size

    @property
    def num_weights(self) -> int:
        """Weights of all matrices that a decode step reads, LM head included; each costs a row 2 FLOPs."""
        width = self.num_heads * self.head_size
        per_layer = self.qkv_flops_per_row // 2 + self.hidden_size * (width + 3 * self.intermediate_size)
        return self.num_layers * per_layer + self.hidden_size * self.vocab_size


LLAVA_7B = TextShape(32, 4096, 11008, 32, 32, 128, 32064)
"""LLaVA-1.5-7B's language model, Vicuna-7B."""
LLAVA_13B = TextShape(40, 5120, 13824, 40, 40, 128, 32064)
"""LLaVA-1.5-13B's language model, Vicuna-13B."""


@dataclass(frozen=True)
class VisionShape:
    """A ViT as in CLIP or SigLIP, and LLaVA's two-layer projector behind it.

    ``num_layers`` counts the layers that run (LLaVA reads the last but one, so the last never does). ``num_tokens`` are
    the tower's rows, a class token included; ``num_patches`` of them are projected.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    patch_size: int
    num_patches: int
    num_tokens: int
    projector_input_size: int
    text_hidden_size: int
    num_channels: int = 3

    def flops(self, tokens_left: int | None = None) -> int:
        """FLOPs of one image: ``2 P c p^2 C``, ``L (T (8 C^2 + 4 C M) + 4 C T^2)``, projector.

        P patches of side p and c channels, T rows, L layers, C hidden size, M MLP size; attention is bidirectional. The
        projector is ``2 P (C_in C_text + C_text^2)``. Layers after the first, and the projector, run ``tokens_left``
        patches (None: all).
        """
        left = self.num_patches if tokens_left is None else tokens_left
        rows_left = left + self.num_tokens - self.num_patches
        patches = 2 * self.num_patches * self.num_channels * self.patch_size**2 * self.hidden_size
        layers = self._layer_flops(self.num_tokens) + (self.num_layers - 1) * self._layer_flops(rows_left)
        into, out = self.projector_input_size, self.text_hidden_size
        return patches + layers + 2 * left * (into * out + out**2)

    def _layer_flops(self, rows: int) -> int:
        hidden = self.hidden_size
        return rows * (8 * hidden**2 + 4 * hidden * self.intermediate_size) + 4 * hidden * rows**2


LLAVA_7B_VISION = VisionShape(23, 1024, 4096, 14, 576, 577, 1024, 4096)
"""CLIP ViT-L/14 at 336 pixels up to its last but one layer, projected to 4096."""
LLAVA_13B_VISION = VisionShape(23, 1024, 4096, 14, 576, 577, 1024, 5120)
"""The same tower, projected to 5120."""


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
    # Hugging Face counts outputs: 0 is the patch embedding, so -1 is the last of num_hidden_layers + 1.
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
