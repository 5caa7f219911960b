"""One to sixteen images in a prompt, wherever they stand, alike or of any size: the oracle's tokens, always."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from tests.engine.harness import Ask, engine, prompt
from tests.engine.test_oracle_parity import check_equal, reference, selections_of
from vllm_hidrop.verify.tiny_models import NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

OWN = {"shape": [NUM_LAYERS, TOKENS_PER_IMAGE]}
CHOICES: dict[str, dict[str, Any]] = {
    "hidrop": {
        "method": "hidrop",
        "options": OWN | {"inject_layer": 3, "filter_layers": [4, 6], "keeps": [20, 5], "exit_layer": 8},
    },
    "fastv": {"method": "fastv"},
}
LAYOUTS = {
    "one": "3i4",
    "two, first": "ii5",
    "three between texts": "2i3i1i4",
    "five, all in the middle": "6iiiii7",
    "eight, one text token after the last": "2ii3iiiii2i1",
    "sixteen": "1i2i1ii3iiii1i2iiiiiii5",
}
SETTINGS: dict[str, Any] = {
    "limit_mm_per_prompt": {"image": 16},
    "max_model_len": 1200,
    "max_num_batched_tokens": 4096,
}


def asks() -> list[Ask]:
    """Of every layout, and: an image as the very first token, the same image twice and again in another prompt."""
    rng = np.random.default_rng(1)
    found = [
        Ask(prompt(rng, layout), tuple(range(20 * i, 20 * i + layout.count("i"))), max_tokens=4)
        for i, layout in enumerate(LAYOUTS.values())
    ]
    found.append(Ask(prompt(rng, "i4i3")[1:], (500, 501), max_tokens=4))
    alike = Ask(prompt(rng, "2i3ii4"), (7, 8, 7), max_tokens=4)
    return [*found, alike, replace(alike, images=(7, 7, 7)), replace(alike, images=(8, 7, 7))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), "mistral")


@pytest.mark.parametrize("name", CHOICES)
def test_many_images_equal_the_oracle_alone_and_together(model: Path, name: str) -> None:
    choice = CHOICES[name]
    expected = [reference(model, choice, ask) for ask in asks()]
    with engine(model, choice, **SETTINGS) as running:
        for ask, result in zip(asks(), expected, strict=True):
            with running.record_selections() as kept:
                check_equal(running.ask([ask])[0], result)
            assert kept == selections_of([result])
        for answer, ask, result in zip(running.ask(asks()), asks(), expected, strict=True):
            check_equal(answer, result)
            assert answer.report["mode"] == "pruned"
            assert answer.report["vision_tokens"] == TOKENS_PER_IMAGE * len(ask.images)


def test_an_image_as_the_last_item_runs_dense_however_many_there_are(model: Path) -> None:
    rng = np.random.default_rng(2)
    found = [Ask(prompt(rng, layout), tuple(range(layout.count("i")))) for layout in ("3i4i", "iii", "2iiii3ii")]
    with engine(model, None, **SETTINGS) as running:
        stock = [answer.token_ids for answer in running.ask(found)]
    with engine(model, CHOICES["hidrop"], **SETTINGS) as running:
        answers = running.ask([*found, Ask(prompt(rng, "3i4"), (1,))])
    assert [answer.token_ids for answer in answers[:-1]] == stock
    assert [answer.report["mode"] for answer in answers] == ["fallback"] * 3 + ["pruned"]


def test_images_of_other_sizes_are_resized_and_pruned_alike(model: Path) -> None:
    sizes = ((20, 30), (200, 50), (64, 64), (333, 1), (65, 63))
    rng = np.random.default_rng(3)
    several = Ask(prompt(rng, "2i3ii1i2i4"), tuple(range(5)), sizes=sizes)
    single = [Ask(prompt(rng, "3i4"), (9,), sizes=(size,)) for size in sizes]
    processor = AutoProcessor.from_pretrained(model).image_processor
    choice = CHOICES["hidrop"]
    with engine(model, choice, **SETTINGS) as running:
        answers = running.ask([several, *single])
        for ask, answer in zip([several, *single], answers, strict=True):
            pixels = [processor(image, return_tensors="pt")["pixel_values"] for image in ask.pictures()]
            check_equal(answer, reference(model, choice, ask, torch.cat(pixels)))
            assert running.ask([ask])[0].token_ids == answer.token_ids
    assert len({tuple(answer.token_ids) for answer in answers}) > 3
