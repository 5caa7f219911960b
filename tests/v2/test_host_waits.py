"""When the host waits for the device: never, but where a method decides counts or a request asks to explain."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.harness import Ask, Engine, engine, prompt
from tests.v2.host_waits import Watch
from vllm_hidrop.runners.stage_inputs import StageInputs
from vllm_hidrop.staged import image_runs, loop
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

METHODS: dict[str, dict[str, Any]] = {
    "hidrop": {"method": "hidrop", "preset": "tok48", "options": {"scale": True}},
    "compacted": {"method": "hidrop", "preset": "tok48", "options": {"scale": True}, "positions": "compacted"},
    "grouped": {"method": "hidrop", "preset": "tok48", "options": {"scale": True}, "positions": "grouped"},
    "pyramiddrop": {"method": "pyramiddrop", "options": {"cuts": [0.25, 0.5], "keeps": [30, 3]}},
    "renumbered": {
        "method": "pyramiddrop",
        "options": {"cuts": [0.25, 0.5], "keeps": [30, 3]},
        "positions": "renumbered",
    },
    "fastv": {"method": "fastv"},
    "uniform": {"method": "uniform"},
}


def waits(running: Engine, **options: Any) -> Counter[str]:
    """Of prefills, of an image that is reused, and of decode steps."""
    rng = np.random.default_rng(4)
    layouts = {"3i5": 1, "9": 0, "2ii3i4": 3}
    asks = [Ask(prompt(rng, each), tuple(range(9 * n, 9 * n + n)), options, 4) for each, n in layouts.items()]
    running.ask(asks)
    running.ask(asks)  # the first reuse of an image learns how pages store slots
    with Watch(running.runner) as watch:
        running.ask(asks + asks)
    return watch.found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("choice", METHODS.values(), ids=METHODS)
def test_no_step_of_a_method_of_fixed_counts_waits(model: Path, choice: dict[str, Any]) -> None:
    with engine(model, choice) as running:
        assert waits(running) == {}


def test_a_decision_is_read_once_per_cut_and_an_explanation_once_per_step(model: Path) -> None:
    with engine(model, {"method": "visipruner", "options": {"scale": True}}) as running:
        assert read(waits(running)) == {"adaptive.py:decide"}
    with engine(model, METHODS["hidrop"]) as running:
        assert read(waits(running, hidrop_explain=True)) == {"explain.py:patches_run"}


def read(found: Counter[str]) -> set[str]:
    """Sites that read: here the copy that a device makes is the tensor itself, which is then read as an array."""
    kinds, sites = zip(*(each.split(" in ") for each in found), strict=True)
    assert set(kinds) == {"read by cpu", "read by numpy"}
    return set(sites)


def test_reads_and_pageable_copies_are_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_rows, places = StageInputs.full_rows, image_runs.image_places

    def reading(inputs: Any, batch: Any) -> Any:
        inputs.seq_lens.max().item()
        return full_rows(inputs, batch)

    def copying(*args: Any) -> Any:
        return torch.from_numpy(places(*args)).to(torch.device("cpu")).numpy()

    monkeypatch.setattr(StageInputs, "full_rows", reading)
    monkeypatch.setattr(loop, "image_places", copying)
    monkeypatch.setattr("tests.v2.host_waits.is_ours", lambda: True)
    with engine(model, METHODS["hidrop"]) as running:
        found = waits(running)
    assert found["read by item in test_host_waits.py:reading"] > 0
    assert found["copy from pageable memory in test_host_waits.py:copying"] > 0
