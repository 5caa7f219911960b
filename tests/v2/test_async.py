"""Asynchronous scheduling on the V2 runner: a step is scheduled before the last one's report is read.

vLLM switches it off on a CPU; here the platform is kept from doing so. Steps of V2 need no token on the host, so they
run as they would on a device, one after the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from vllm.platforms.cpu import CpuPlatform

from tests.engine.harness import Ask, Engine, engine, prompt
from vllm_hidrop.engine import configure
from vllm_hidrop.engine.scheduler import StagedAsyncScheduler, StagedScheduler
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

CHOICES: dict[str, dict[str, Any]] = {
    "hidrop": {"method": "hidrop", "preset": "tok48", "options": {"scale": True}},
    "visipruner": {"method": "visipruner", "options": {"scale": True, "drop_shallow_kv": True}},
    "mustdrop": {"method": "mustdrop", "options": {"scale": True, "merge_threshold": None}},
}
LAYOUTS = {"3i5": 1, "i7": 1, "2ii3i4": 3, "9": 0, "1i1": 1, "5i9": 1, "ii3": 2}


def asks() -> list[Ask]:
    rng = np.random.default_rng(8)
    return [
        Ask(prompt(rng, layout), tuple(range(10 * i, 10 * i + images)), max_tokens=40 - 3 * i)
        for i, (layout, images) in enumerate(LAYOUTS.items())
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@contextmanager
def asynchronous() -> Iterator[None]:
    """Let engines that start while entered schedule ahead."""
    update = CpuPlatform.check_and_update_config.__func__

    def update_but_that(cls: Any, config: Any) -> None:
        update(cls, config)
        config.scheduler_config.async_scheduling = True

    with (
        patch.object(CpuPlatform, "check_and_update_config", classmethod(update_but_that)),
        patch.object(configure, "schedules_ahead", lambda config: True),
    ):
        yield


def run(running: Engine) -> list[list[int]]:
    """Requests that come one by one, one of which is aborted on its way."""
    answers: dict[str, list[int]] = {}

    def step() -> None:
        for output in running.step():
            if output.finished and output.request_id != "aborted":
                answers[output.request_id] = list(output.outputs[0].token_ids)

    for number, ask in enumerate(asks()):
        running.add(str(number), ask)
        step()
    running.add("aborted", asks()[2])
    step()
    running.llm.llm_engine.abort_request(["aborted"])
    while running.llm.llm_engine.has_unfinished_requests():
        step()
    return [answers[str(number)] for number in range(len(LAYOUTS))]


@pytest.fixture(scope="module", params=sorted(CHOICES))
def choice_and_alone(request: pytest.FixtureRequest, model: Path) -> tuple[dict[str, Any], list[list[int]]]:
    choice = CHOICES[request.param]
    with engine(model, choice) as running:
        return choice, [running.ask([ask])[0].token_ids for ask in asks()]


FEW_BLOCKS = {"hidrop": 90, "visipruner": 140, "mustdrop": 140}


@pytest.mark.parametrize("fits", [True, False], ids=["all fit", "some are preempted"])
def test_steps_scheduled_ahead_answer_as_steps_one_by_one(
    model: Path, choice_and_alone: tuple[dict[str, Any], list[list[int]]], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, alone = choice_and_alone
    preempted: list[str] = []
    preempt = StagedScheduler._preempt_request

    def noted(scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(scheduler, request, *args, **kwargs)

    monkeypatch.setattr(StagedScheduler, "_preempt_request", noted)
    blocks = 2048 if fits else FEW_BLOCKS[choice["method"]]
    with asynchronous(), engine(model, choice, num_gpu_blocks_override=blocks, max_model_len=320) as running:
        assert isinstance(running.scheduler, StagedAsyncScheduler)
        assert running.core.batch_queue is not None
        assert run(running) == alone
    assert bool(preempted) != fits
