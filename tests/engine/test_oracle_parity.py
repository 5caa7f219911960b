"""The staged engine against the dense masked reference: same selections, same logits, same tokens."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.harness import Answer, Ask, engine, in_any_order, picture, prompt
from tests.oracles.masked import Oracle, OracleResult
from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.methods import METHODS, ModelShape
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.verify.reference.stages import OracleStage, Rule
from vllm_hidrop.verify.tiny_models import IMAGE_TOKEN, NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

SHAPE = ModelShape(NUM_LAYERS, TOKENS_PER_IMAGE)
OWN = {"shape": [NUM_LAYERS, TOKENS_PER_IMAGE]}
SCHEDULES: dict[str, list[dict[str, Any]]] = {
    "none": [{}],
    "hidrop": [
        {"preset": "tok48", "options": {"scale": True}},
        {"options": OWN | {"inject_layer": 3, "filter_layers": [4, 6], "keeps": [20, 5], "exit_layer": 8}},
        {"options": OWN | {"inject_layer": 1, "filter_layers": [2, 3, 5], "keeps": [0.5, 9, 1], "exit_layer": None}},
        {"options": OWN | {"inject_layer": 2, "filter_layers": [], "keeps": [], "exit_layer": 5}},
        {"options": OWN | {"inject_layer": 2, "filter_layers": [2, 3], "keeps": [63, 62], "exit_layer": 5}},
    ],
    "fastv": [
        {},
        {"options": {"layer": 1, "keep": 7}},
        {"options": {"layer": 5, "keep": 0.25, "exit_layer": 7}},
        {"options": {"layer": 3, "keep": 0}},
    ],
    "pyramiddrop": [
        {},
        {"options": {"cuts": [0.25, 0.5], "keeps": [30, 3]}},
        {"options": {"cuts": [0.125, 0.25, 0.375, 0.5], "keeps": [0.9, 0.7, 0.2, 0.02]}},
        {"options": {"cuts": [0.875], "keeps": [1]}},
    ],
    "random": [
        {},
        {"options": {"layer": 0, "keep": 9}},
        {"options": {"layer": 3, "keep": 1, "seed": 5}},
        {"options": {"layer": 7, "keep": 0.75}},
    ],
    "uniform": [
        {},
        {"options": {"layer": 0, "keep": 0.25}},
        {"options": {"layer": 6, "keep": 5}},
        {"options": {"layer": 1, "keep": 63}},
    ],
}
MODELS = ("llama-clip", "mistral-clip", "qwen2-siglip")
CHOICES = [(method, i, choice) for method, choices in SCHEDULES.items() for i, choice in enumerate(choices)]
CASES = [
    pytest.param(MODELS[turn % 3], {"method": method} | choice, id=f"{method}-{i}-{MODELS[turn % 3]}")
    for turn, (method, i, choice) in enumerate(CHOICES)
]
LAYOUTS = {"3i5": 1, "i7": 1, "2ii3i4": 3, "9": 0, "1i1": 1, "5i2i6": 2}


def asks(**options: str) -> list[Ask]:
    rng = np.random.default_rng(3)
    return [
        Ask(prompt(rng, layout), tuple(range(10 * i, 10 * i + images)), options)
        for i, (layout, images) in enumerate(LAYOUTS.items())
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parts = {name: name.split("-") for name in MODELS}
    return {name: make_llava(tmp_path_factory.mktemp(name), text, tower) for name, (text, tower) in parts.items()}


@cache
def oracle(model: Path) -> Oracle:
    return Oracle(model)


def rule_of(choice: dict[str, Any]) -> Rule:
    of_method: dict[str, Rule] = {"random": "random", "uniform": "uniform", "none": "uniform"}
    of_signal: dict[Signal, Rule] = {
        Signal.PREVIOUS_ATTENTION: "attention_previous",
        Signal.NEXT_ATTENTION: "attention_next",
    }
    name = choice["method"]
    return of_method[name] if name in of_method else of_signal[METHODS[name].signal]


def pixel_values(ask: Ask) -> torch.Tensor | None:
    if not ask.images:
        return None
    pixels = np.stack([np.asarray(picture(seed), dtype=np.float32) for seed in ask.images])
    return torch.from_numpy((pixels / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)


def reference(model: Path, choice: dict[str, Any], ask: Ask, pixels: torch.Tensor | None = None) -> OracleResult:
    """The oracle's answer; its stages come from the schedule alone, its pixels from the images if not given."""
    schedule = resolve(HidropConfig.parse(choice), SHAPE).schedule
    kept = schedule.kept(TOKENS_PER_IMAGE)
    if ask.options.get("hidrop") == "off":
        kept = (TOKENS_PER_IMAGE,) * len(kept)
    stages = [
        OracleStage(stage.first_layer, (keep,) * len(ask.images))
        for stage, keep in zip(schedule.stages, kept, strict=True)
    ]
    tokens = [t for token in ask.tokens for t in [token] * (TOKENS_PER_IMAGE if token == IMAGE_TOKEN else 1)]
    seed = choice.get("options", {}).get("seed", 0)
    positions = choice.get("positions", "persistent")
    return oracle(model).generate(
        tokens,
        pixel_values(ask) if pixels is None else pixels,
        stages,
        rule_of(choice),
        ask.max_tokens,
        seed=seed,
        positions=positions,
    )


def check_equal(answer: Answer, expected: OracleResult) -> None:
    assert answer.token_ids == expected.token_ids
    torch.testing.assert_close(answer.logits, expected.logits, atol=1e-4, rtol=1e-4)


def selections_of(results: list[OracleResult]) -> dict[int, list[list[int]]]:
    together: dict[int, list[list[int]]] = {}
    for result in results:
        for layer, images in result.selections.items():
            together.setdefault(layer, []).extend(images)
    return together


@pytest.mark.parametrize(("name", "choice"), CASES)
def test_staged_equals_oracle_alone_and_in_a_mixed_batch(
    models: dict[str, Path], name: str, choice: dict[str, Any]
) -> None:
    model = models[name]
    expected = [reference(model, choice, ask) for ask in asks()]
    with engine(model, choice) as running:
        if choice["method"] == "none":
            for answer, result in zip(running.ask(asks()), expected, strict=True):
                check_equal(answer, result)
            return
        for ask, result in zip(asks(), expected, strict=True):
            with running.record_selections() as kept:
                check_equal(running.ask([ask])[0], result)
            assert kept == selections_of([result])
        with running.record_selections() as kept:
            answers = running.ask(asks())
        assert in_any_order(kept) == in_any_order(selections_of(expected))
        for answer, result in zip(answers, expected, strict=True):
            check_equal(answer, result)
