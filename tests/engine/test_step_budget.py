"""The step budget counts rows that are computed: step tables on the real scheduler, and answers that stay the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.harness import Ask, Engine, engine, prompt
from tests.engine.test_blocks import HIDROP
from vllm_hidrop.engine.step_budget import StepBudget, most_tokens
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import make_plan
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.verify.tiny_models import NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

KEPT = (0, 64, 20, 3, 0)
LAYERS = (2, 1, 2, 1, NUM_LAYERS - 6)
MEAN = sum(kept * count for kept, count in zip(KEPT, LAYERS, strict=True)) / NUM_LAYERS
"""Vision rows of one image, averaged over the layers."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


def steps(running: Engine, asks: dict[str, Ask], num_steps: int) -> list[dict[str, int]]:
    """What the first steps run when all requests arrive at once: tokens by request."""
    table: list[dict[str, int]] = []
    schedule = running.scheduler.schedule

    def recording(*args: Any) -> Any:
        output = schedule(*args)
        table.append({key.split("-")[0]: n for key, n in output.num_scheduled_tokens.items()})
        return output

    running.scheduler.schedule = recording
    try:
        for name, ask in asks.items():
            running.add(name, ask)
        while running.llm.llm_engine.has_unfinished_requests():
            running.step()
    finally:
        running.scheduler.schedule = schedule
    return table[:num_steps]


@pytest.mark.engine
def test_pruned_prompts_share_a_step_that_is_too_small_for_their_tokens(model: Path) -> None:
    """Budget 90 rows. An image of 64 tokens and 10 text tokens, one before it, is 74 tokens and 10 + MEAN rows."""
    rng = np.random.default_rng(0)
    cost = 10 + MEAN
    assert 3 * cost <= 90 < 4 * cost
    images = {name: Ask(prompt(rng, "i9"), (seed,), max_tokens=3) for seed, name in enumerate("abcd")}
    text = {"t": Ask(prompt(rng, "9" * 20), max_tokens=3)}  # 181 tokens
    off = {"o": Ask(images["a"].tokens, (9,), {"hidrop": "off"}, max_tokens=3)}
    with engine(model, HIDROP, max_num_batched_tokens=90, max_model_len=296, enable_prefix_caching=False) as running:
        assert running.scheduler.max_num_scheduled_tokens == 360, "four tokens per row at most"
        # Three images start; of the fourth the text before it; what is left goes to who came later.
        found = steps(running, images | text, 3)
        left = int(90 - 3 * cost - 1)
        assert found[0] == {"a": 74, "b": 74, "c": 74, "d": 1, "t": left}
        then = int(90 - 3 - (cost - 1))
        assert found[1] == {"a": 1, "b": 1, "c": 1, "d": 73, "t": then}
        assert found[2] == {"a": 1, "b": 1, "c": 1, "d": 1, "t": min(86, 181 - left - then)}
        # A text prompt that comes first takes what it needs; then there is no room for an image.
        found = steps(running, text | images, 3)
        assert found[0] == {"t": 90}
        assert found[1] == {"t": 90}
        assert found[2] == {"t": 1, "a": 74, "b": 74, "c": 74, "d": 1}, "the last token of its prompt"
        # An unpruned prompt counts all of its tokens: it is split as in vLLM.
        found = steps(running, images | off, 2)
        assert found[0] == {"a": 74, "b": 74, "c": 74, "d": 1, "o": 1} | {"o": left}
        assert found[1]["o"] == min(then, 74 - left)
        isolated = [running.ask([ask])[0].token_ids for ask in (images | text | off).values()]
        together = running.ask([*(images | text | off).values()])
        assert [answer.token_ids for answer in together] == isolated


@pytest.mark.engine
def test_a_prompt_above_the_budget_runs_beside_decodes_but_not_beside_prefills(model: Path) -> None:
    """Budget 30 rows; two images are 128 tokens and more rows than that."""
    rng = np.random.default_rng(1)
    big = Ask(prompt(rng, "ii9"), (1, 2), max_tokens=2)
    assert 10 + 2 * MEAN > 30
    small = Ask(prompt(rng, "9"), max_tokens=9)
    settings = {"max_num_batched_tokens": 30, "max_model_len": 200, "enable_prefix_caching": False}
    with engine(model, HIDROP, **settings) as running:
        found = steps(running, {"s": small, "b": big, "c": big}, 4)
    assert found[0] == {"s": 10, "b": 1, "c": 1}, "the text before the images"
    assert found[1] == {"s": 1, "b": 137}
    assert found[2] == {"s": 1, "b": 1, "c": 137}


def test_the_budget_alone() -> None:
    schedule = Schedule.of({0: 0, 2: "all", 4: 0}, 8)
    plan = make_plan(schedule, 110, [Span(10, 80)])
    assert schedule.mean_over_layers(plan.dropped) == 60
    assert most_tokens(100, schedule, 80) == 400
    assert most_tokens(100, Schedule.of({0: "all", 4: 40}, 8), 80) == 133
    budget = StepBudget(100, schedule)
    assert budget.fit(plan, 0, 110) == 110
    budget.spend("a", plan, 0, 110)
    assert budget.left == 50
    assert budget.fit(plan, 110, 1) == 1
    assert budget.fit(plan, 0, 110) == 110
    budget.spend("b", plan, 0, 110)
    assert budget.fit(plan, 0, 110) == 0
    budget.take_back("b")
    assert budget.left == 50
    # Behind a reused image: 20 tokens before the last stages cut, which run those of the image again.
    schedule = Schedule.of({0: 0, 2: "all", 4: 8}, 8)
    behind = replace(make_plan(schedule, 110, [Span(10, 80)]), prefix_tokens=10, carried_from=8)
    assert behind.first_cut == 2
    budget = StepBudget(49, schedule)
    assert budget.fit(behind, 90, 20) == 20
    budget.spend("c", behind, 90, 20)
    assert budget.left == 49 - (20 * 4 + (38 - 8) * 4) / 8 == 24
    assert budget.fit(behind, 90, 20) < 20, "fewer tokens than rows are left, but more rows"
    assert StepBudget(23, schedule).fit(behind, 90, 20) == 20, "alone, where it is too large for any step"
    budget = StepBudget(100, schedule)
    budget.start()
    assert budget.left == 100
    assert TOKENS_PER_IMAGE == 64
