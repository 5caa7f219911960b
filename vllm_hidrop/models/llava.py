"""LLaVA-1.5 with a CLIP or SigLIP tower and a Llama, Mistral or Qwen2 text model."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaForConditionalGeneration, LlavaImagePixelInputs
from vllm.model_executor.models.utils import StageMissingLayer

from vllm_hidrop.engine.configure import methods_of, staged_decoder
from vllm_hidrop.engine.model_checks import reduction_of
from vllm_hidrop.methods.adaptive import KeyLayer
from vllm_hidrop.plan.plan import DENSE
from vllm_hidrop.runners.tower_attention import TowerKernel, has_tower_kernel
from vllm_hidrop.staged.encoder_selection import ClassAttention, ReducingTower
from vllm_hidrop.staged.merging import Reduced
from vllm_hidrop.staged.model import StagedForward


class HidropLlavaForConditionalGeneration(StagedForward, LlavaForConditionalGeneration):
    """vLLM's LLaVA, whose decoder layers can also run stage by stage, and whose tower can run fewer rows."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        text = self.language_model.model
        self.decoder = staged_decoder(vllm_config, text.layers, text.norm)
        self.methods = methods_of(vllm_config)
        self.reducing_tower: ReducingTower | None = None
        self.tower_kernel: TowerKernel | None = None
        if not isinstance(self.vision_tower, StageMissingLayer):  # a server of text alone loads no tower
            self._prepare_tower(vllm_config)

    def _prepare_tower(self, vllm_config: VllmConfig) -> None:
        reduction = reduction_of(self.methods.values())
        if reduction is not None:
            tower = self.vision_tower.vision_model
            is_last = reduction.key_layer is KeyLayer.LAST
            layer = self.config.vision_config.num_hidden_layers if is_last else len(tower.encoder.layers)
            self.class_attention = ClassAttention(self.config.vision_config, layer - 1)
            self.reducing_tower = ReducingTower(tower, reduction, self.class_attention)
        if has_tower_kernel(self.config.vision_config, vllm_config.model_config.dtype):
            self.tower_kernel = TowerKernel.of(self.vision_tower)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load as vLLM does, and the weights of the class attention, whose layer vLLM may not load."""
        if self.reducing_tower is None:
            return super().load_weights(weights)
        loaded = super().load_weights(self.class_attention.load(weights))
        return loaded | {f"class_attention.{name}" for name, _ in self.class_attention.named_parameters()}

    @contextmanager
    def encoding(self, name: str) -> Iterator[list[Reduced | None]]:
        """See ``StagedModel.encoding``."""
        with ExitStack() as stack:
            if self.tower_kernel is not None and name != DENSE:
                stack.enter_context(self.tower_kernel.entered())
            if self.reducing_tower is not None and name.endswith(self.reducing_tower.reduction.name):
                yield stack.enter_context(self.reducing_tower.reducing())
            else:
                yield []

    def _process_image_input(self, image_input: Any) -> Any:
        tower = self.reducing_tower
        if tower is None or tower.found is None:
            return super()._process_image_input(image_input)
        if not isinstance(image_input, LlavaImagePixelInputs):  # features that a client sent
            tower.found += [None] * len(image_input["data"])
            return super()._process_image_input(image_input)
        return [tower.encode(pixels, self.multi_modal_projector) for pixels in image_input["pixel_values"]]
