"""Qwen3.5, dense and with experts: three of four layers are recurrent (Gated DeltaNet), every fourth has attention."""

from typing import Any

from vllm_hidrop.models.family import MergedPatches
from vllm_hidrop.models.qwen_vl import merging_tower
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.vision import VisionShape


class Qwen35(MergedPatches):
    """Images of any size, interleaved M-RoPE, no deepstack; timestamps between a video's frames are text.

    Attention is gated: its output is multiplied by a projection of the rows that entered the layer, so that a cut
    cannot shorten them in between.
    """

    stock = "Qwen3_5ForConditionalGeneration"
    title = "Qwen3.5"
    layers = {"qwen3_5_text": Form.BLACK_BOX}  # noqa: RUF012
    towers = ("qwen3_5", "qwen3_5_vision")
    ran = (("qwen3_5_text", "qwen3_5_vision"),)
    reuses_images = False

    def vision_shape(self, config: Any) -> VisionShape | None:
        """A plain MLP, one merger."""
        vision = config.vision_config
        mlp_weights = 2 * vision.hidden_size * vision.intermediate_size
        return merging_tower(vision, vision.hidden_size, mlp_weights, vision.out_hidden_size)

    def attention_layers(self, config: Any) -> tuple[int, ...]:
        """Those whose type says so."""
        kinds = self.text_config(config).layer_types
        return tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")


class Qwen35Moe(Qwen35):
    """The same with experts."""

    stock = "Qwen3_5MoeForConditionalGeneration"
    title = "Qwen3.5-MoE"
    layers = {"qwen3_5_moe_text": Form.BLACK_BOX}  # noqa: RUF012
    towers = ("qwen3_5_moe", "qwen3_5_moe_vision")
    ran = (("qwen3_5_moe_text", "qwen3_5_moe_vision"),)
