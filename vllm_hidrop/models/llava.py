"""LLaVA-1.5 with a CLIP or SigLIP tower and a Llama, Mistral or Qwen2 text model."""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaForConditionalGeneration

from vllm_hidrop.engine.batch import StagedStep
from vllm_hidrop.models.staged import staged_forward


class HidropLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """vLLM's LLaVA, whose decoder layers can also run stage by stage."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        text = self.language_model.model
        self._staged = staged_forward(vllm_config, text.layers, text.norm)

    def forward_staged(self, step: StagedStep, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Final hidden states [T, C] of a step that prefills pruned prompts; see ``engine.forward.StagedForward``."""
        return self._staged(step, inputs_embeds, positions)
