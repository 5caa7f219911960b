"""The patches that a report lists when its request asks: the oracle's selections, whatever became of the request."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from math import isqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.engine.harness import Answer, Ask, Engine, engine, prompt
from tests.engine.test_adaptive_parity import MUSTDROP, VISIPRUNER, mustdrop_options, recorded, visipruner_options
from tests.engine.test_blocks import count_preemptions
from tests.engine.test_image_prefix import conversation
from tests.engine.test_oracle_parity import asks, reference
from tests.engine.test_prefix import CHOICES
from tests.oracles.masked import OracleResult
from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.staged.explain import patches_run
from vllm_hidrop.verify.tiny_models import NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

EXPLAIN = {"hidrop_explain": True}
ADAPTIVE: dict[str, Any] = {
    "visipruner": (VISIPRUNER[0][0], {"method": "visipruner", "options": visipruner_options(VISIPRUNER[0][1])}),
    "mustdrop": (
        MUSTDROP[0][0],
        {"method": "mustdrop", "preset": "tok64", "options": mustdrop_options(MUSTDROP[0][1])},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), "mistral")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def made(name: str) -> Path:
        text, tower = name.split("-")
        return make_llava(tmp_path_factory.mktemp(name), text, tower)

    return made


def explained(ask: Ask) -> Ask:
    return replace(ask, options=ask.options | EXPLAIN)


def patches(answer: Answer) -> list[Any]:
    return [stage["patches"] for stage in answer.report["stages"]]


def expected(choice: dict[str, Any], ask: Ask, result: OracleResult) -> list[Any]:
    """What every stage keeps of every image, by the oracle's selections and otherwise all or nothing."""
    schedule: Schedule = resolve(HidropConfig.parse(choice), ModelShape(NUM_LAYERS, TOKENS_PER_IMAGE)).schedule
    kept = schedule.kept(TOKENS_PER_IMAGE)
    return [
        result.selections.get(stage.first_layer, [list(range(count))] * len(ask.images))
        for stage, count in zip(schedule.stages, kept, strict=True)
    ]


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "hidrop-compacted"])
def test_the_patches_are_the_oracles_selections_alone_and_in_a_mixed_batch(model: Path, name: str) -> None:
    choice = CHOICES[name]
    wanted = [expected(choice, ask, reference(model, choice, ask)) for ask in asks()]
    with engine(model, choice) as running:
        for ask, found in zip(asks(), wanted, strict=True):
            assert patches(running.ask([explained(ask)])[0]) == found
        mixed = [each for ask in asks() for each in (explained(ask), ask)]
        answers = running.ask(mixed)
    assert [patches(answer) for answer in answers[::2]] == wanted
    for answer in answers[1::2]:
        assert all("patches" not in stage for stage in answer.report["stages"])
    for answer, other in zip(answers[::2], answers[1::2], strict=True):
        assert answer.token_ids == other.token_ids


def many(rng: np.random.Generator) -> list[Ask]:
    return [Ask(prompt(rng, "9i9"), (number,), EXPLAIN, max_tokens=40) for number in range(8)]


def test_a_preempted_request_lists_the_same(model: Path) -> None:
    asked = many(np.random.default_rng(4))
    with engine(model, CHOICES["hidrop"], num_gpu_blocks_override=60, max_model_len=160) as tight:
        alone = [patches(tight.ask([ask])[0]) for ask in asked]
        preempted = count_preemptions(tight)
        together = [patches(answer) for answer in tight.ask(asked)]
    assert preempted, "the pool was large enough: nothing was tested"
    assert together == alone


@pytest.mark.parametrize("name", ADAPTIVE)
def test_what_an_adaptive_method_decided_is_listed_also_after_a_preemption(
    make: Callable[[str], Path], name: str
) -> None:
    parts, choice = ADAPTIVE[name]
    asked = [explained(ask) for ask in asks()]
    with engine(make(parts), choice) as running:
        schedule = running.scheduler.planner.schedule
        with recorded(running) as found:
            answers = running.ask(asked)
        pruned = [answer for answer in answers if answer.report["mode"] == "pruned"]
        decided = [[layers[stage.first_layer] for stage in schedule.stages] for layers in found]
        assert [patches(answer) for answer in pruned] == decided
        assert any(len(image) not in (0, TOKENS_PER_IMAGE) for of in decided for stage in of for image in stage)
        running.add("again", replace(asked[0], max_tokens=20))
        again = None
        for number in range(60):
            if number == 3:
                running.scheduler._preempt_request(running.scheduler.running.pop(), 0.0)
            again = next((output for output in running.step() if output.finished), None)
            if again:
                break
        assert again is not None
        assert [stage["patches"] for stage in again.kv_transfer_params["hidrop"]["stages"]] == patches(answers[0])


@pytest.fixture(scope="module")  # the tests with engines of their own come first: one lives at a time
def hidrop(model: Path) -> Iterator[Engine]:
    with engine(model, CHOICES["hidrop"]) as started:
        yield started


def test_reused_images_are_listed_as_they_are_when_they_run(model: Path, hidrop: Engine) -> None:
    turns = conversation(np.random.default_rng(1), "9")
    reused = []
    for ask, _ in turns:
        answer = hidrop.ask([explained(ask)])[0]
        assert patches(answer) == expected(CHOICES["hidrop"], ask, reference(model, CHOICES["hidrop"], ask))
        reused.append(answer.report["reused_tokens"])
    assert sum(number > TOKENS_PER_IMAGE for number in reused) > 4, "too little was reused: nothing was tested"


def test_the_patches_follow_the_keeps_of_the_request(hidrop: Engine) -> None:
    ask = Ask(prompt(np.random.default_rng(2), "3i2i5"), (1, 2), {"hidrop_keep": ["all", "all", 11, 4, 0]})
    found = patches(hidrop.ask([explained(ask)])[0])
    assert [[len(image) for image in stage] for stage in found] == [[64, 64], [64, 64], [11, 11], [4, 4], [0, 0]]
    for before, after in pairwise(found):
        assert all(set(now) <= set(then) for now, then in zip(after, before, strict=True))


def test_a_request_that_is_not_pruned_lists_every_patch(hidrop: Engine) -> None:
    rng = np.random.default_rng(3)
    whole = list(range(TOKENS_PER_IMAGE))
    text = Ask(prompt(rng, "9"), (), EXPLAIN)
    off = Ask(prompt(rng, "3i2i5"), (1, 2), {"hidrop": "off"} | EXPLAIN)
    fallback = Ask(prompt(rng, "3i"), (1,), EXPLAIN)
    answers = hidrop.ask([text, off, fallback])
    assert [answer.report["mode"] for answer in answers] == ["text", "off", "fallback"]
    assert patches(answers[0]) == [[]] * 5
    assert patches(answers[1]) == [[whole, whole]] * 5
    assert patches(answers[2]) == [[whole]] * 5


def test_nothing_is_read_back_where_nobody_asks() -> None:
    silent: Any = SimpleNamespace(prefills=(SimpleNamespace(plan=SimpleNamespace(explains=False)),))
    poison: Any = [None]  # not a tensor: whatever is done with it fails
    assert patches_run(silent, poison) == {}


@pytest.mark.parametrize("value", ["true", 2, 1.0, [1], None])
def test_a_wish_that_is_neither_true_nor_false_is_refused(hidrop: Engine, value: Any) -> None:
    with pytest.raises(ValueError, match=r"hidrop_explain.* must be true or false"):
        hidrop.scheduler.planner.plan(9, (), {"hidrop_explain": value})


def test_where_the_tokens_lie_is_told_image_by_image_pruned_or_not(hidrop: Engine) -> None:
    asked = Ask(prompt(np.random.default_rng(8), "3i2i4"), (1, 2))
    side = isqrt(TOKENS_PER_IMAGE)
    tile = {"start": 0, "columns": side, "rows": side, "stride": side, "box": [0, 0, 1, 1]}
    grid = {"tiles": [tile], "whole": None, "cropped": True}
    spans = [{"item": image, "frame": None, "tokens": TOKENS_PER_IMAGE, "grid": grid} for image in (0, 1)]
    off = replace(asked, options={"hidrop": "off"})
    answers = hidrop.ask([explained(asked), explained(off), asked])
    assert [answer.report.get("spans") for answer in answers] == [spans, spans, None]
