"""The staged models of LLaVA-1.5 and LLaVA-NeXT: their CLIP tower can run fewer rows."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaForConditionalGeneration, LlavaImagePixelInputs
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextImageEmbeddingInputs,
    LlavaNextImageInputs,
)
from vllm.model_executor.models.utils import StageMissingLayer

from vllm_hidrop.engine.model_checks import reduction_of
from vllm_hidrop.methods.adaptive import KeyLayer
from vllm_hidrop.models.llava import Llava, patches
from vllm_hidrop.models.llava_next import LlavaNext
from vllm_hidrop.models.staged_class import StagedVisionLanguageModel
from vllm_hidrop.staged.encoder_selection import ClassAttention, ReducingTower
from vllm_hidrop.staged.merging import Reduced


class ReducingModel(StagedVisionLanguageModel):
    """In front of a vLLM model class with a CLIP tower, which a method's reduction makes run fewer rows."""

    config: Any
    vision_tower: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.reducing_tower: ReducingTower | None = None
        reduction = reduction_of(self.methods.values())
        if reduction is None or isinstance(self.vision_tower, StageMissingLayer):
            return
        tower = self.vision_tower.vision_model
        is_last = reduction.key_layer is KeyLayer.LAST
        layer = self.config.vision_config.num_hidden_layers if is_last else len(tower.encoder.layers)
        self.class_attention = ClassAttention(self.config.vision_config, layer - 1)
        self.reducing_tower = ReducingTower(tower, reduction, self.class_attention)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load as vLLM does, and the weights of the class attention, whose layer vLLM may not load."""
        parent: Any = super()
        if self.reducing_tower is None:
            return parent.load_weights(weights)
        loaded = parent.load_weights(self.class_attention.load(weights))
        return {*loaded} | {f"class_attention.{name}" for name, _ in self.class_attention.named_parameters()}

    @contextmanager
    def encoding(self, name: str) -> Iterator[list[Reduced | None]]:
        """See ``StagedModel.encoding``."""
        with super().encoding(name) as reduced:
            if self.reducing_tower is None or not name.endswith(self.reducing_tower.reduction.name):
                yield reduced
            else:
                with self.reducing_tower.reducing() as found:
                    yield found


class HidropLlavaForConditionalGeneration(ReducingModel, LlavaForConditionalGeneration):
    """vLLM's LLaVA, whose decoder layers can also run stage by stage, and whose tower can run fewer rows."""

    family = Llava()

    def _process_image_input(self, image_input: Any) -> Any:
        tower = self.reducing_tower
        if tower is None or tower.found is None:
            return super()._process_image_input(image_input)
        if not isinstance(image_input, LlavaImagePixelInputs):  # features that a client sent
            tower.found += [None] * len(image_input["data"])
            return super()._process_image_input(image_input)
        return [tower.encode(pixels, self.multi_modal_projector) for pixels in image_input["pixel_values"]]


class HidropLlavaNextForConditionalGeneration(ReducingModel, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT, of which each tile is an image of the tower of its own."""

    family = LlavaNext()

    def _process_image_input(self, image_input: LlavaNextImageInputs) -> Any:
        tower = self.reducing_tower
        if tower is None or tower.found is None:
            return super()._process_image_input(image_input)
        if isinstance(image_input, LlavaNextImageEmbeddingInputs):
            tower.found += [None] * len(image_input["data"])
            return super()._process_image_input(image_input)
        return [
            self._encode_image(tower, pixels, size)
            for pixels, size in zip(image_input["pixel_values"], image_input["image_sizes"], strict=True)
        ]

    def _encode_image(self, tower: ReducingTower, pixels: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Features [tokens, C] of one image's ``pixels`` [tiles, channels, height, width]."""
        numbers = torch.arange(len(pixels) * patches(self.config)).view(len(pixels), -1, 1)
        # vLLM's packing of features, of these numbers in their place.
        stand_in: Any = SimpleNamespace(config=self.config, image_newline=torch.tensor([-1]))
        pack = LlavaNextForConditionalGeneration._merge_image_patch_embeddings
        places = pack(stand_in, size, numbers, strategy="spatial_unpad")[:, 0].numpy()
        features = tower.encode_tiles(pixels, self.multi_modal_projector, places)
        return self._merge_image_patch_embeddings(size, features, strategy="spatial_unpad")
