"""What the references say to a question: tokens, log-probabilities, and the vision tokens that every layer runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from transformers import AutoProcessor

from vllm_hidrop.config import HidropConfig, Resolved, resolve
from vllm_hidrop.methods import METHODS, ModelShape
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.verify.cases import Model, Question
from vllm_hidrop.verify.prompts import Prompt, pictures
from vllm_hidrop.verify.reference.attention import Kept, load_model
from vllm_hidrop.verify.reference.mustdrop import MustDropOracle, MustDropResult
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings
from vllm_hidrop.verify.reference.pruning import Settings, StagedSettings
from vllm_hidrop.verify.reference.shortened import Reference, Result
from vllm_hidrop.verify.reference.stages import OracleStage, Rule
from vllm_hidrop.verify.reference.visipruner import VisiPrunerSettings

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
        return load_model(self.model.path, self.dtype).to(self.device, self.computes)

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self._weights, self.computes, AutoProcessor.from_pretrained(self.model.path))

    def expected(self, question: Question, prompt: Prompt, chosen: Resolved | None) -> Expected:
        """The answer to a question, of which vLLM made ``prompt``, under a method; None drops nothing."""
        prepared = self._reference.prompt(prompt.token_ids, pictures(question, prompt.sizes))
        settings = settings_of(chosen, prompt) if chosen else None
        result: Result | MustDropResult
        if isinstance(settings, MustDropSettings) and (settings.merge_threshold is not None or settings.key_rate):
            of_tower = MustDropOracle(self._weights, self.computes)
            pixels = prepared.inputs.get("pixel_values")
            result = of_tower.generate(prompt.token_ids, pixels, settings, question.max_tokens)
        else:
            result = self._reference.run(prepared, prompt.spans, settings, question.max_tokens)
        return Expected(result.token_ids, list(result.logits.log_softmax(dim=-1)), result.kept)


def settings_of(chosen: Resolved, prompt: Prompt) -> Settings:
    """A method's settings for the reference; a keep is counted by each image's own size."""
    method: Any = chosen.method
    if method.name == "visipruner":
        return _same_fields(VisiPrunerSettings, method, stages=tuple(method.parts))
    if method.name == "mustdrop":
        return _same_fields(MustDropSettings, method, filter_layers=tuple(method.filter_layers))
    stages = [
        OracleStage(stage.first_layer, tuple(stage.keep.resolve(end - first) for first, end in prompt.spans))
        for stage in chosen.schedule.stages
    ]
    return StagedSettings(stages, _BY_PLACE.get(method.name) or _RULES[method.signal], getattr(method, "seed", 0))


def _same_fields(settings: Any, method: Any, **others: Any) -> Any:
    """A reference's settings from the fields of the same name of a method, and ``others``."""
    names = {field.name for field in fields(settings)} - set(others)
    return settings(**{name: getattr(method, name) for name in names}, **others)
