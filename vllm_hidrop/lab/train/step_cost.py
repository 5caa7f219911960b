"""One training step with a schedule beside the same step dense: seconds, and bytes held for the backward pass.

Both steps train one model with one optimiser on one batch in bfloat16 autocast: frozen vision tower, projector,
language model, loss on the last text tokens, AdamW.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_hidrop.lab.train.staged import Rows, StagedTraining
from vllm_hidrop.methods import Method, ModelShape
from vllm_hidrop.methods.none import NoPruning

NUM_TARGETS = 16


@dataclass(frozen=True)
class StepCost:
    """Medians of one kind of step."""

    seconds: float
    activation_bytes: int
    """Distinct storages that autograd holds when the loss is ready, parameters excluded."""


class TrainingStep:
    """A random LLaVA and one batch: each prompt one image, then text.

    Args:
        model: a Hugging Face LLaVA in float32.
        batch: prompts.
        num_text: text tokens per prompt, one of them before the image.
    """

    def __init__(self, model: Any, batch: int, num_text: int) -> None:
        self.model = model
        self.num_vision = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
        model.model.vision_tower.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        size = model.config.vision_config.image_size
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(batch, 3, size, size, generator=generator)
        self.ids = torch.randint(4, 1000, (batch, num_text), generator=generator)
        self.rows = self._rows(batch, num_text)

    def _rows(self, batch: int, num_text: int) -> Rows:
        length = num_text + self.num_vision
        images = torch.full((batch, length), -1)
        images[:, 1 : 1 + self.num_vision] = 0
        is_query = torch.zeros(batch, length, dtype=torch.bool)
        is_query[:, -NUM_TARGETS - 1] = True
        return Rows(torch.arange(length).expand(batch, -1), images, torch.ones_like(is_query), is_query)

    def forward_of(self, method: Method) -> StagedTraining:
        """The model's decoder under a method."""
        shape = ModelShape(self.model.config.text_config.num_hidden_layers, self.num_vision)
        return StagedTraining.from_method(self.model.model.language_model, method, shape)

    def loss(self, staged: StagedTraining) -> Tensor:
        """Cross-entropy of the last tokens, a scalar."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            vision = self._image_features()
            text = self.model.get_input_embeddings()(self.ids)
            embeds = torch.cat([text[:, :1], vision.to(text.dtype), text[:, 1:]], 1)
            output = staged(embeds, self.rows)
            logits = self.model.lm_head(output.hidden[:, -NUM_TARGETS - 1 : -1])
        return F.cross_entropy(logits.float().flatten(0, 1), self.ids[:, -NUM_TARGETS:].flatten())

    def _image_features(self) -> Tensor:
        with torch.no_grad():
            tower = self.model.model.vision_tower(self.pixels, output_hidden_states=True)
        features = tower.hidden_states[self.model.config.vision_feature_layer][:, 1:]
        projected: Tensor = self.model.model.multi_modal_projector(features)
        return projected

    def run(self, staged: StagedTraining) -> float:
        """One whole step; returns its seconds."""
        started = time.perf_counter()
        self.loss(staged).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def activation_bytes(self, staged: StagedTraining) -> int:
        """Bytes autograd holds for the backward pass, each storage once."""
        held: dict[int, int] = {}
        owned = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(staged)
        del loss
        return sum(held.values())


def measure(
    model: nn.Module, method: Method, batch: int, num_text: int, runs: int, on_run: Callable[[], None]
) -> tuple[StepCost, StepCost]:
    """Dense and ``method``, in turn ``runs`` times after a warm-up; ``on_run`` is called after every pair."""
    step = TrainingStep(model, batch, num_text)
    forwards = step.forward_of(NoPruning()), step.forward_of(method)
    for staged in forwards:
        step.run(staged)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for staged, times in zip(forwards, seconds, strict=True):
            times.append(step.run(staged))
        on_run()
    dense, pruned = (
        StepCost(median(times), step.activation_bytes(staged)) for staged, times in zip(forwards, seconds, strict=True)
    )
    return dense, pruned
