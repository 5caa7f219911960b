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
from torch import Tensor, nn

from vllm_hidrop.lab.train.decoder import Decoder
from vllm_hidrop.lab.train.llava_training import LlavaTraining, freeze_for
from vllm_hidrop.lab.train.prompts import IGNORED, Batch
from vllm_hidrop.lab.train.rows import packed_starts
from vllm_hidrop.lab.train.staged import StagedTraining
from vllm_hidrop.methods import Method, ModelShape
from vllm_hidrop.methods.none import NoPruning

NUM_TARGETS = 16


@dataclass(frozen=True)
class StepCost:
    """Medians of one kind of step."""

    seconds: float
    activation_bytes: int
    """Storages that autograd holds when the loss is ready, each once, parameters excluded."""


class TrainingStep:
    """A random LLaVA (float32) and ``batch`` prompts: one text token, an image, then ``num_text - 1`` text tokens."""

    def __init__(self, model: Any, batch: int, num_text: int) -> None:
        self.model = model
        vision = model.config.vision_config
        self.shape = ModelShape(
            model.config.text_config.num_hidden_layers, (vision.image_size // vision.patch_size) ** 2
        )
        freeze_for(model, "instruct")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(batch, 3, vision.image_size, vision.image_size, generator=generator)
        text = torch.randint(4, 1000, (batch, num_text), generator=generator)
        num_vision = self.shape.tokens_per_image
        ids = torch.cat(
            [text[:, :1], text.new_full((batch, num_vision), model.config.image_token_index), text[:, 1:]], 1
        )
        images = torch.full_like(ids, -1)
        images[:, 1 : 1 + num_vision] = 0
        labels = torch.full_like(ids, IGNORED)
        labels[:, -NUM_TARGETS:] = ids[:, -NUM_TARGETS:]
        is_query = torch.zeros_like(ids, dtype=torch.bool)
        is_query[:, -NUM_TARGETS - 1] = True
        row_starts = packed_starts([ids.shape[1]] * batch)
        self.batch = Batch(ids.flatten(), labels.flatten(), images.flatten(), is_query.flatten(), row_starts, pixels)

    def module_of(self, method: Method) -> LlavaTraining:
        """The model under a method."""
        staged = StagedTraining.from_method(Decoder(self.model.model.language_model), method, self.shape)
        return LlavaTraining(self.model, staged, self.shape.tokens_per_image)

    def loss(self, module: LlavaTraining) -> Tensor:
        """Mean cross-entropy of the last tokens, a scalar."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss: Tensor = module(self.batch)
        return loss / (self.batch.labels != IGNORED).sum()

    def run(self, module: LlavaTraining) -> float:
        """One whole step; returns its seconds."""
        started = time.perf_counter()
        self.loss(module).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def activation_bytes(self, module: LlavaTraining) -> int:
        """Bytes that autograd holds for the backward pass, each storage once."""
        held: dict[int, int] = {}
        owned = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(module)
        del loss
        return sum(held.values())


def measure(
    model: nn.Module, method: Method, batch: int, num_text: int, runs: int, on_run: Callable[[], None]
) -> tuple[StepCost, StepCost]:
    """Costs of dense and of ``method``, run in turn ``runs`` times after a warm-up; ``on_run`` follows every pair."""
    step = TrainingStep(model, batch, num_text)
    modules = step.module_of(NoPruning()), step.module_of(method)
    for module in modules:
        step.run(module)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for module, times in zip(modules, seconds, strict=True):
            times.append(step.run(module))
        on_run()
    dense, pruned = (
        StepCost(median(times), step.activation_bytes(module)) for module, times in zip(modules, seconds, strict=True)
    )
    return dense, pruned
