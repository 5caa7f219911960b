"""Random arrivals of every kind of request under a pool that preempts: each answer is the one it gets alone."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.harness import Ask, engine, prompt
from tests.engine.test_adaptive_blocks import CHOICES as ADAPTIVE
from tests.engine.test_blocks import HIDROP, count_preemptions
from tests.engine.traffic import Traffic, Wanted, alone
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

PYRAMIDDROP = {"method": "pyramiddrop", "options": {"cuts": [0.25, 0.5], "keeps": [0.5, 0.1]}}
SERVERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], int]] = {
    # the server's choice, wishes that only it can honour, blocks of the pool
    "hidrop": (HIDROP, [{"hidrop_keep": [0, "all", 0.5, 7, 1]}, {"hidrop_keep": ["all", 30, 10, 3, 0]}], 90),
    "fastv": ({"method": "fastv"}, [{"hidrop_keep": ["all", 9]}, {"hidrop_method": "random"}], 40),
    "pyramiddrop": (PYRAMIDDROP, [{"hidrop_keep": ["all", 40, 3]}, {"hidrop_method": "fastv"}], 50),
    "visipruner": (ADAPTIVE["visipruner"], [], 80),
    "mustdrop": (ADAPTIVE["mustdrop"], [], 80),
}
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which takes 60 ms of every step
NUM_REQUESTS = 20 if IS_INTERPRETED else 50
SEEDED = {"temperature": 1.0, "seed": 5}


def wanted(wishes: list[dict[str, Any]]) -> list[Wanted]:
    rng = np.random.default_rng(4)
    found = [Wanted(Ask(prompt(rng, "5i5"), (1,), wish, max_tokens=50)) for wish in [{}, {"hidrop": "off"}, *wishes]]
    found += [
        Wanted(Ask(prompt(rng, "i2i9"), (1, 2), max_tokens=40)),
        Wanted(Ask(prompt(rng, "9i9i4"), (2, 2), {"hidrop": "off"}, max_tokens=30)),
        Wanted(Ask(prompt(rng, "9" * 12), max_tokens=50)),
        Wanted(Ask(prompt(rng, "9"), max_tokens=70)),
        Wanted(Ask(prompt(rng, "3i4"), (3,), max_tokens=30), SEEDED),
        Wanted(Ask(prompt(rng, "3i4"), (3,), max_tokens=30), SEEDED | {"n": 3}),
        Wanted(Ask(prompt(rng, "9" * 9), max_tokens=40), SEEDED | {"n": 2}),
        Wanted(Ask(prompt(rng, "3i4"), (4,), max_tokens=40), {"stop_token_ids": list(range(20, 26))}),
        Wanted(Ask(prompt(rng, "2i8"), (4,), max_tokens=40), {"repetition_penalty": 1.3}),
        Wanted(Ask(prompt(rng, "3i"), (5,), max_tokens=20)),
    ]
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("name", SERVERS)
def test_answers_under_random_traffic_are_those_in_isolation(model: Path, name: str) -> None:
    choice, wishes, num_blocks = SERVERS[name]
    kinds = wanted(wishes)
    limits = {"max_model_len": 256, "max_num_batched_tokens": 256}
    with engine(model, choice, num_gpu_blocks_override=num_blocks, **limits) as running:
        expected = alone(running, kinds)
        preempted = count_preemptions(running)
        finished = Traffic(running, kinds, random.Random(name)).run(NUM_REQUESTS, abort_share=0.01)
        assert preempted, "the pool was large enough: nothing was tested"
    wrong = {key: which for key, (which, answered) in finished.items() if answered != expected[which]}
    assert not wrong, f"{len(wrong)} of {len(finished)}: {wrong}"
    assert len(finished) > 0.6 * NUM_REQUESTS
    if not IS_INTERPRETED:
        assert {which for which, _ in finished.values()} == set(range(len(kinds)))


def test_a_resumed_request_reuses_at_most_its_prompt(model: Path) -> None:
    """It finds blocks with what it had generated as well; a report of less than nothing once ended the server."""
    rng = np.random.default_rng(5)
    asks = [Ask(prompt(rng, "9" * 4), max_tokens=85) for _ in range(4)]
    with engine(model, {"method": "fastv"}, num_gpu_blocks_override=60, max_model_len=256) as running:
        preempted = count_preemptions(running)
        reports = [answer.report for answer in running.ask(asks)]
        assert preempted, "the pool was large enough: nothing was tested"
    assert max(report["reused_tokens"] for report in reports) > 0
    for report in reports:
        assert report["reused_tokens"] <= report["prompt_tokens"]
        assert 0 <= report["layer_tokens"] <= report["layer_tokens_dense"]
