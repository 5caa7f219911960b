"""Qwen3-VL, dense and with experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_hidrop.models.family import MergedPatches
from vllm_hidrop.models.qwen_vl import merging_tower
from vllm_hidrop.plan.form import Form
from vllm_hidrop.plan.vision import VisionShape


class Qwen3VL(MergedPatches):
    """Images of any size, interleaved M-RoPE, deepstack levels; timestamps between a video's frames are text."""

    stock = "Qwen3VLForConditionalGeneration"
    title = "Qwen3-VL"
    layers = {"qwen3_vl_text": Form.STANDARD}  # noqa: RUF012
    towers = ("qwen3_vl", "qwen3_vl_vision")
    ran = (("qwen3_vl_text", "qwen3_vl_vision"),)

    def vision_shape(self, config: Any) -> VisionShape | None:
        """A plain MLP, and a merger for every deepstack level."""
        vision = config.vision_config
        mlp_weights = 2 * vision.hidden_size * vision.intermediate_size
        num_mergers = 1 + self.num_levels(config)
        return merging_tower(vision, vision.hidden_size, mlp_weights, vision.out_hidden_size, num_mergers)

    def num_levels(self, config: Any) -> int:
        """One per tower layer that is read besides the last."""
        return len(config.vision_config.deepstack_visual_indexes)

    @contextmanager
    def levels(self, model: Any, num_rows: int) -> Iterator[list[Any]]:
        """The buffers that vLLM fills with the embeddings; it clears them behind its own forward."""
        buffers = model._get_deepstack_input_embeds(num_rows)
        yield [] if buffers is None else [buffers[f"deepstack_input_embeds_{i}"] for i in range(len(buffers.tensors))]
        model._clear_deepstack_input_embeds(num_rows)


class Qwen3VLMoe(Qwen3VL):
    """The same with experts."""

    stock = "Qwen3VLMoeForConditionalGeneration"
    title = "Qwen3-VL-MoE"
    layers = {"qwen3_vl_moe_text": Form.STANDARD}  # noqa: RUF012
    towers = ("qwen3_vl_moe", "qwen3_vl_moe_vision")
    ran = (("qwen3_vl_moe_text", "qwen3_vl_moe_vision"),)
