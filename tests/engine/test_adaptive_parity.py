"""Methods that decide their own counts, staged and paged, against their dense masked references.

Equal are survivors of every layer and image, cut and exit layers, logits and greedy tokens: alone and in mixed batches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.harness import Answer, Ask, Engine, engine, prompt
from tests.engine.test_oracle_parity import pixel_values
from tests.oracles.visipruner import VisiPrunerOracle
from vllm_hidrop.verify.reference.mustdrop import MustDropOracle
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings
from vllm_hidrop.verify.reference.visipruner import VisiPrunerSettings
from vllm_hidrop.verify.tiny_models import IMAGE_TOKEN, NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

MODELS = ("llama-clip", "mistral-clip", "qwen2-siglip", "qwen2-clip")
LAYOUTS = {"3i5": 1, "i7": 1, "2ii3i4": 3, "9": 0, "1i1": 1, "5i2i6": 2}
SHAPE = {"shape": [NUM_LAYERS, TOKENS_PER_IMAGE]}
VISIPRUNER = [
    ("llama-clip", VisiPrunerSettings(2, cosine=0.96, norm=0.3, exit_cosine=0.98)),
    ("mistral-clip", VisiPrunerSettings(1, cosine=0.9, norm=0.5, exit_cosine=0.95, exit_count=1, test_every=2)),
    ("qwen2-siglip", VisiPrunerSettings(2, cosine=0.8, norm=0.4, exit_cosine=0.9, exit_consecutive=False)),
    ("llama-clip", VisiPrunerSettings(2, cosine=0.85, norm=0.2, exit_cosine=0.5, form="pre_softmax")),
    ("qwen2-clip", VisiPrunerSettings(3, cosine=0.99, norm=0.1, exit_cosine=0.999, sink="half")),
    ("mistral-clip", VisiPrunerSettings(2, form="pre_softmax", sink="half", cosine=0.9, norm=2.0)),
    ("llama-clip", VisiPrunerSettings(2, filter_layer=4, keep=9, exit_layer=7, drop_shallow_kv=True)),
    ("qwen2-siglip", VisiPrunerSettings(1, filter_layer=3, keep=20, exit_cosine=0.9, exit_count=1)),
    ("mistral-clip", VisiPrunerSettings(0, cosine=0.95, norm=0.3, stages=("middle",))),
    ("llama-clip", VisiPrunerSettings(3, stages=("shallow",), drop_shallow_kv=True)),
    ("qwen2-clip", VisiPrunerSettings(2, cosine=-1.0)),
]
MUSTDROP = [
    ("llama-clip", MustDropSettings(0.014, 0.03, (1, 3, 5), 0.2, 2)),
    ("mistral-clip", MustDropSettings(0.014, 0.05, (0, 2), 0.1, 4, key_layer="feature")),
    ("qwen2-clip", MustDropSettings(0.014, 0.03, (2, 6), 0.3, 2, key_rate=0.2)),
    ("qwen2-siglip", MustDropSettings(0.014, 0.03, (1, 4), None, 2, key_rate=0.0)),
    ("llama-clip", MustDropSettings(0.014, 0.03, (1, 3, 5), 0.2, 2, cut_cache=False)),
    ("mistral-clip", MustDropSettings(1.0, 1.0, (3,), -1.0, 4)),
    ("qwen2-clip", MustDropSettings(1.0, 0.0, (3,), None, 3)),
    ("llama-clip", MustDropSettings(1.0, 1.0, (3, 5), 0.2, 2, key_rate=0.0, key_layer="feature")),
    ("mistral-clip", MustDropSettings(0.02, 0.05, (2, 3, 4), 0.2, 2)),
]
CASES: dict[str, list[tuple[int, str, Any]]] = {
    "visipruner": [(i, *case) for i, case in enumerate(VISIPRUNER)],
    "mustdrop": [(i, *case) for i, case in enumerate(MUSTDROP)],
}


def asks(seed: int) -> list[Ask]:
    rng = np.random.default_rng(seed)
    return [
        Ask(prompt(rng, layout), tuple(range(100 * seed + 10 * i, 100 * seed + 10 * i + images)))
        for i, (layout, images) in enumerate(LAYOUTS.items())
    ]


def full_tokens(ask: Ask) -> list[int]:
    return [t for token in ask.tokens for t in [token] * (TOKENS_PER_IMAGE if token == IMAGE_TOKEN else 1)]


def visipruner_options(settings: VisiPrunerSettings) -> dict[str, Any]:
    options = asdict(settings)
    return {"parts": list(options.pop("stages")), **options, **SHAPE}


def mustdrop_options(settings: MustDropSettings) -> dict[str, Any]:
    return {**asdict(settings), "filter_layers": list(settings.filter_layers), **SHAPE}


@contextmanager
def recorded(running: Engine) -> Iterator[list[list[list[list[int]]]]]:
    """While entered, what each request's layers ran with, in the order of arrival: [layer][image] -> tokens."""
    found: dict[int, list[list[list[int]]]] = {}
    in_order: list[list[list[list[int]]]] = []
    schedule = running.runner.planner.schedule
    ran = running.runner.staged.ran

    def recording(outcome: Any) -> Any:
        for name, stages in outcome.survivors.items():
            found[int(name.split("-")[0])] = [
                [image.tolist() for image in stages[schedule.stage_of_layer(layer)]] for layer in range(NUM_LAYERS)
            ]
        return ran(outcome)

    running.runner.staged.ran = recording
    try:
        yield in_order
    finally:
        running.runner.staged.ran = ran
        in_order += [found[number] for number in sorted(found)]


def check(answers: list[Answer], kept: list[Any], expected: list[Any], asked: list[Ask]) -> None:
    for answer, result in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer.logits, result.logits, atol=1e-4, rtol=1e-4)
        assert answer.token_ids == result.token_ids
    assert kept == [result.kept for result, ask in zip(expected, asked, strict=True) if ask.images]


def check_margins(expected: list[Any]) -> None:
    """Tell how near to a threshold the statistics came; a case that rounding decides would prove nothing."""
    nearest = {name: min(result.margins[name] for result in expected) for name in expected[0].margins}
    print("nearest to a threshold:", ", ".join(f"{name} {margin:.1e}" for name, margin in nearest.items()))
    assert min(nearest.values()) > 1e-6


def check_method(
    model: Path, choice: dict[str, Any], seed: int, reference: Callable[[Ask], Any]
) -> tuple[list[Answer], list[Any]]:
    asked = asks(seed)
    expected = [reference(ask) for ask in asked]
    with engine(model, choice) as running:
        for ask, result in zip(asked, expected, strict=True):
            with recorded(running) as kept:
                answers = running.ask([ask])
            check(answers, kept, [result], [ask])
        off = [Ask(ask.tokens, ask.images, {"hidrop": "off"}) for ask in asked]
        off_alone = [running.ask([ask])[0] for ask in off]
        with recorded(running) as kept:
            answers = running.ask([each for pair in zip(asked, off, strict=True) for each in pair])
        check(answers[::2], kept, expected, asked)
        assert [answer.token_ids for answer in answers[1::2]] == [answer.token_ids for answer in off_alone]
    return answers[::2], expected


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    def made(name: str, seed: int) -> Path:
        text, tower = name.split("-")
        return make_llava(tmp_path_factory.mktemp(name), text, tower, seed)

    return made


@pytest.mark.parametrize(("number", "name", "settings"), CASES["visipruner"])
def test_visipruner(
    make: Callable[[str, int], Path],
    number: int,
    name: str,
    settings: VisiPrunerSettings,
) -> None:
    model = make(name, number)
    oracle = VisiPrunerOracle(model)
    choice = {"method": "visipruner", "options": visipruner_options(settings)}
    answers, expected = check_method(
        model,
        choice,
        number,
        lambda ask: oracle.generate(full_tokens(ask), pixel_values(ask), settings, ask.max_tokens),
    )
    for answer, result in zip(answers, expected, strict=True):
        if len(result.cut_layers) == 1:
            counts = [len(layer[0]) for layer in result.kept]
            assert answer.report["cut_layer"] == next((i for i, n in enumerate(counts) if n < counts[0]), None)
            assert answer.report["exit_layer"] == next((i for i, n in enumerate(counts) if not n), None)
    check_margins(expected)


@pytest.mark.parametrize(("number", "name", "settings"), CASES["mustdrop"])
def test_mustdrop(
    make: Callable[[str, int], Path],
    number: int,
    name: str,
    settings: MustDropSettings,
) -> None:
    model = make(name, 100 + number)
    oracle = MustDropOracle(model)
    choice = {"method": "mustdrop", "preset": "tok64", "options": mustdrop_options(settings)}
    _, expected = check_method(
        model,
        choice,
        number,
        lambda ask: oracle.generate(full_tokens(ask), pixel_values(ask), settings, ask.max_tokens),
    )
    check_margins(expected)
