"""Features of one image that the tower makes in several ways are never mixed up: in any order, batched or alone."""

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.harness import Answer, Ask, Engine, engine, prompt
from vllm_hidrop.plan.plan import DENSE
from vllm_hidrop.runners.tower_attention import KERNEL
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

CHOICES: dict[str, dict[str, Any]] = {
    "merging": {
        "method": "mustdrop",
        "options": {
            "filter_layers": [1, 3],
            "cut_cache": False,
            "merge_threshold": -1.0,  # every window
            "merge_window": 2,
            "key_rate": 0.2,
            "global_threshold": 0.03,
            "individual_threshold": 0.03,
            "scale": True,
            "shape": [8, 64],
        },
    },
    "not merging": {"method": "fastv", "options": {"layer": 2, "keep": 9}},
}


@pytest.fixture(scope="module", params=list(CHOICES))
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = make_llava(tmp_path_factory.mktemp("llava"), "llama")
    with engine(model, CHOICES[request.param]) as started:
        yield started


def wishes(running: Engine) -> dict[str, dict[str, Any]]:
    """By name, every method of the server, and nothing pruned."""
    methods = running.scheduler.planner.methods
    return {"off": {"hidrop": "off"}} | {name: {"hidrop_method": name} for name in methods}


def forget(running: Engine) -> None:
    assert running.llm.reset_prefix_cache()
    running.llm.llm_engine.reset_encoder_cache()


def check(answer: Answer, alone: Answer) -> None:
    assert answer.token_ids == alone.token_ids
    assert [stage["kept"] for stage in answer.report["stages"]] == [stage["kept"] for stage in alone.report["stages"]]
    torch.testing.assert_close(answer.logits, alone.logits, atol=1e-5, rtol=1e-5)


def test_every_pair_of_methods_in_both_orders_answers_as_alone(running: Engine) -> None:
    tokens = prompt(np.random.default_rng(3), "4ii5")
    asks = {name: Ask(tokens, (1, 2), wish) for name, wish in wishes(running).items()}
    alone = {}
    for name, ask in asks.items():
        forget(running)
        alone[name] = running.ask([ask])[0]
    assert len(asks) > 2
    assert len({tuple(answer.token_ids) for answer in alone.values()}) > 1, "no two differ: nothing would be seen"
    for first, second in permutations(asks, 2):
        forget(running)
        for name in (first, second, first, second):
            check(running.ask([asks[name]])[0], alone[name])
        forget(running)
        for name, answer in zip((first, second), running.ask([asks[first], asks[second]]), strict=True):
            check(answer, alone[name])


def test_an_image_is_encoded_once_in_every_way_that_is_asked_for(running: Engine) -> None:
    tokens = prompt(np.random.default_rng(4), "4i5")
    methods = running.scheduler.planner.methods
    runs: list[int] = []
    encode = running.runner.model.embed_multimodal

    def counted(**kwargs: Any) -> Any:
        runs.append(len(kwargs["pixel_values"]))
        return encode(**kwargs)

    forget(running)
    running.runner.model.embed_multimodal = counted
    try:
        for _ in range(2):
            for seed, wish in enumerate(wishes(running).values()):
                running.ask([Ask((*tokens, 5 + seed), (1,), wish)])
    finally:
        del running.runner.model.embed_multimodal
    ways = {DENSE} | {method.encoding for method in methods.values()}
    assert sum(runs) == len(ways)
    cache = running.runner.encoder_cache
    names = getattr(cache, "encoder_outputs", cache).keys()  # on the V2 runner, on V1
    assert len(names) == len(ways)
    assert len({name.split(":")[0] for name in names}) == 1


def test_the_way_has_a_name_that_says_what_the_tower_does(running: Engine) -> None:
    planner = running.scheduler.planner
    own = planner.methods[planner.method].encoding
    assert own.startswith(KERNEL)
    others = {method.encoding for name, method in planner.methods.items() if name != planner.method}
    if planner.method == "mustdrop":
        assert "merge -1.0 of 2" in own
        assert others == {KERNEL}
    else:
        assert {own} | others == {KERNEL}
