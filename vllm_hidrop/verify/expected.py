"""What the references say to a question: tokens, log-probabilities, and the vision tokens that every layer runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vllm_hidrop.config import HidropConfig, Resolved, resolve
from vllm_hidrop.methods import METHODS, ModelShape
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.verify.cases import Model, Question, picture
from vllm_hidrop.verify.reference.attention import Kept, load_model
from vllm_hidrop.verify.reference.masked import Oracle
from vllm_hidrop.verify.reference.mustdrop import MustDropOracle
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings
from vllm_hidrop.verify.reference.stages import OracleStage, Rule
from vllm_hidrop.verify.reference.visipruner import VisiPrunerOracle, VisiPrunerSettings

_RULES: dict[Signal, Rule] = {
    Signal.PREVIOUS_ATTENTION: "attention_previous",
    Signal.NEXT_ATTENTION: "attention_next",
}
_BY_PLACE: dict[str, Rule] = {"random": "random", "uniform": "uniform", "none": "uniform"}


Logprobs = torch.Tensor | dict[int, float]
"""Log-probabilities at one generated token: of the whole vocabulary, or of the likeliest tokens."""


@dataclass(frozen=True)
class Expected:
    """What an answer is compared with: tokens, log-probabilities of each, ``kept[layer][image]`` vision tokens."""

    token_ids: list[int]
    logprobs: Sequence[Logprobs]
    kept: list[Kept]


def resolved_choice(choice: Mapping[str, Any], method: str, shape: ModelShape) -> Resolved:
    """A server's choice for its own method, and another method's default as a request of that server gets it."""
    if choice.get("method", method) == method:
        return resolve(HidropConfig.parse(choice), shape)
    scale = {"scale": True} if "scale" in METHODS[method].option_names() else {}
    return resolve(HidropConfig.parse({"method": method, "options": scale, "force": True}), shape)


class References:
    """The references on one checkpoint, whose weights are rounded to ``dtype`` before anything is computed.

    They compute in float32, or in ``dtype`` where the checkpoint is too large for that.
    """

    def __init__(self, model: Model, dtype: str, device: str, in_float32: bool = True) -> None:
        self.model = model
        self.dtype = getattr(torch, dtype)
        self.device = device
        self.computes = torch.float32 if in_float32 else self.dtype
        torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 round to 10 bits otherwise

    @cached_property
    def _weights(self) -> Any:
        from transformers.utils import logging

        logging.disable_progress_bar()  # the command has its own
        return load_model(self.model.path, self.dtype).to(self.device, self.computes)

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(self.model.path, backend="pil")

    def _pixels(self, question: Question) -> torch.Tensor | None:
        if not question.images:
            return None
        pictures = [picture(seed, question.size) for seed in question.images]
        pixels = self._processor(images=pictures, return_tensors="np")["pixel_values"]
        return torch.from_numpy(np.asarray(pixels))

    def dense(self, question: Question) -> Expected:
        """The answer with every vision token in every layer."""
        whole = (self.model.shape.tokens_per_image,) * len(question.images)
        return self._staged(question, [OracleStage(0, whole)], "uniform", 0)

    def pruned(self, question: Question, chosen: Resolved) -> Expected:
        """The answer under a method."""
        method: Any = chosen.method.fitted(self.model.shape)
        result: Any
        if method.name == "visipruner":
            settings = _same_fields(VisiPrunerSettings, method, stages=tuple(method.parts))
            result = VisiPrunerOracle(self._weights, self.computes).generate(*self._asked(question, settings))
        elif method.name == "mustdrop":
            settings = _same_fields(MustDropSettings, method, filter_layers=tuple(method.filter_layers))
            result = MustDropOracle(self._weights, self.computes).generate(*self._asked(question, settings))
        else:
            kept = chosen.schedule.kept(self.model.shape.tokens_per_image)
            stages = [
                OracleStage(stage.first_layer, (count,) * len(question.images))
                for stage, count in zip(chosen.schedule.stages, kept, strict=True)
            ]
            rule = _BY_PLACE.get(method.name) or _RULES[method.signal]
            return self._staged(question, stages, rule, getattr(method, "seed", 0))
        return Expected(result.token_ids, list(result.logits.log_softmax(dim=-1)), result.kept)

    def _asked(self, question: Question, settings: Any) -> tuple[Any, ...]:
        return self.model.expanded(question), self._pixels(question), settings, question.max_tokens

    def _staged(self, question: Question, stages: list[OracleStage], rule: Rule, seed: int) -> Expected:
        tokens, pixels = self.model.expanded(question), self._pixels(question)
        oracle = Oracle(self._weights, self.computes)
        result = oracle.generate(tokens, pixels, stages, rule, question.max_tokens, seed=seed)
        is_vision = torch.tensor(tokens) == self.model.image_token
        num_images, size = len(question.images), self.model.shape.tokens_per_image
        kept = [
            [image.nonzero().flatten().tolist() for image in layer[is_vision].view(num_images, size)]
            for layer in result.visible
        ]
        return Expected(result.token_ids, list(result.logits.log_softmax(dim=-1)), kept)


def _same_fields(settings: Any, method: Any, **others: Any) -> Any:
    """A reference's settings from the fields of the same name of a method, and ``others``."""
    names = {field.name for field in fields(settings)} - set(others)
    return settings(**{name: getattr(method, name) for name in names}, **others)
