"""Images that an earlier prompt had already: another question, more turns; against the reference and cold runs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.core.sched.scheduler import Scheduler

from tests.engine.harness import Answer, Ask, Engine, engine, prompt
from tests.engine.test_blocks import count_preemptions
from tests.engine.test_oracle_parity import OWN, check_equal, reference, selections_of
from tests.engine.test_prefix import CHOICES, reused
from vllm_hidrop.engine.image_prefix import prefix_keys
from vllm_hidrop.engine.scheduler import StagedScheduler
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.verify.tiny_models import IMAGE_TOKEN, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

BLOCK = 32
ROW_BYTES = 128 * 4
MORE: dict[str, dict[str, Any]] = {
    "nothing is cut": {
        "method": "hidrop",
        "options": OWN | {"inject_layer": 2, "filter_layers": [], "keeps": [], "exit_layer": 5},
    },
    "cut in the injection layer": {
        "method": "hidrop",
        "options": OWN | {"inject_layer": 2, "filter_layers": [2, 3], "keeps": [63, 62], "exit_layer": 5},
    },
    "random": {"method": "random", "options": {"layer": 3, "keep": 9}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), "mistral")


def end_of_images(tokens: tuple[int, ...], num_images: int) -> int:
    """Tokens of the expanded prompt up to the end of that image."""
    place = [i for i, token in enumerate(tokens) if token == IMAGE_TOKEN][num_images - 1]
    return place + 1 + num_images * (TOKENS_PER_IMAGE - 1)


def conversation(rng: np.random.Generator, start: str) -> list[tuple[Ask, int]]:
    """Prompts in turn, and how many of their first images an earlier one had."""
    text = prompt(rng, start)
    first = (*text, IMAGE_TOKEN)
    question, other, answer = (prompt(rng, layout)[1:] for layout in ("7", "9", "38"))
    second = (*first, *question, *answer, *other)
    third = (*second, IMAGE_TOKEN, *question)
    fourth = (*third, *answer, *other)
    return [
        (Ask((*first, *question), (1,)), 0),
        (Ask((*first, *other), (1,)), 1),
        (Ask((*first, *question), (1,)), 1),
        (Ask((*first, *question), (2,)), 0),
        (Ask(second, (1,)), 1),
        (Ask(third, (1, 3)), 1),
        (Ask(fourth, (1, 3)), 2),
        (Ask((*first, IMAGE_TOKEN, *question), (1, 1)), 1),
        (Ask((*first, IMAGE_TOKEN, *other), (1, 1)), 2),
        (Ask((*first, *other), (2,)), 1),
    ]


def test_a_limit_on_a_hits_length_holds_for_images_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.33 gives one; 0.32 takes none."""
    limits: list[tuple[int, ...]] = []

    def stock(_: Any, __: Any, *limit: int) -> tuple[str, int, int, bool]:
        limits.append(limit)
        return "stock", 0, 0, False

    monkeypatch.setattr(Scheduler, "_get_local_prefix_cache_hit", stock)
    monkeypatch.setattr(StagedScheduler, "_find_image_prefix", lambda *_: SimpleNamespace(num_tokens=40))
    scheduler: Any = object.__new__(StagedScheduler)
    scheduler.records = {"r": SimpleNamespace(plan=SimpleNamespace(is_pruned=True))}
    scheduler.prefixes = SimpleNamespace(blocks_of=lambda _: "image")
    request = SimpleNamespace(request_id="r", num_prompt_tokens=50)
    asked = [(), (40,), (39,)]
    hits = [scheduler._get_local_prefix_cache_hit(request, *limit)[:2] for limit in asked]
    assert hits == [("image", 40), ("image", 40), ("stock", 0)]
    assert limits == asked


@pytest.mark.parametrize("choice", (CHOICES | MORE).values(), ids=list(CHOICES | MORE))
def test_a_reused_image_changes_nothing(model: Path, choice: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    turns = conversation(rng, "9")[:6] + conversation(rng, "99999999")
    expected = [reference(model, choice, ask) for ask, _ in turns]
    with engine(model, choice) as running:
        for (ask, num_images), result in zip(turns, expected, strict=True):
            with running.record_selections() as kept:
                answer = running.ask([ask])[0]
            check_equal(answer, result)
            assert kept == selections_of([result])
            if num_images:
                assert reused(answer) == end_of_images(ask.tokens, num_images)
            else:
                assert reused(answer) < end_of_images(ask.tokens, 1)
            assert answer.report["reuse_off"] is None
        answers = running.ask([ask for ask, _ in turns])
        for (ask, _), answer, result in zip(turns, answers, expected, strict=True):
            check_equal(answer, result)
            assert reused(answer) == end_of_images(ask.tokens, len(ask.images))
        check_states(running)


def check_states(running: Engine) -> None:
    """The worker holds the states that the scheduler counts on, and no more than it may."""
    prefixes = running.scheduler.prefixes
    held = running.runner.staged.states
    assert held.keys() <= prefixes.states.keys() | set(prefixes.orders.drop)
    assert prefixes.states.keys() - set(prefixes.storing.values()) <= held.keys()
    for number, state in prefixes.states.items():
        if number in held:
            assert held[number].numel() * held[number].element_size() == state.num_bytes
    assert prefixes.num_bytes <= prefixes.capacity_bytes
    assert sum(state.numel() * 4 for state in held.values()) <= prefixes.capacity_bytes + sum(
        held[number].numel() * 4 for number in prefixes.orders.drop if number in held
    )
    if not running.scheduler.requests:
        assert not prefixes.storing
        assert not prefixes.hits
        assert not prefixes.keys


def same(answer: Answer, alone: Answer) -> None:
    assert answer.token_ids == alone.token_ids
    torch.testing.assert_close(answer.logits, alone.logits, atol=1e-4, rtol=1e-4)


def traffic(rng: np.random.Generator) -> list[Ask]:
    """Prompts that share text, images, and turns."""
    starts = [prompt(rng, "9"), prompt(rng, "9999")]
    asks = []
    for number in range(14):
        start = starts[number % 2]
        images = tuple(int(i) for i in rng.integers(1, 3, size=1 + number % 3 // 2))
        body = [token for _ in images for token in (IMAGE_TOKEN, *([9] * int(rng.integers(0, 3))))]
        tail = prompt(rng, "3" if number % 4 else "93")[1:]
        options: dict[str, Any] = {"hidrop": "off"} if number % 7 == 6 else {}
        if number % 7 == 3:
            options = {"hidrop_keep": ["all", "all", 11, 4, 0]}
        asks.append(Ask((*start, *body, *tail), images, options, int(rng.integers(1, 24))))
    return [*asks, Ask(starts[1] + prompt(rng, "99"), (), max_tokens=20)]


def test_any_order_of_requests_in_a_small_pool_changes_nothing(model: Path) -> None:
    rng = np.random.default_rng(5)
    asks = traffic(rng)
    choice = CHOICES["hidrop"] | {"prefix_state_bytes": 3 * (TOKENS_PER_IMAGE + 40) * ROW_BYTES}
    with engine(model, choice, num_gpu_blocks_override=110, max_model_len=320, max_num_batched_tokens=320) as running:
        alone = []
        for ask in asks:
            assert running.llm.reset_prefix_cache()
            alone.append(running.ask([ask])[0])
            assert reused(alone[-1]) == 0
        preempted = count_preemptions(running)
        dropped: list[int] = []
        names: dict[str, int] = {}
        got: dict[str, Any] = {}
        aborted: set[str] = set()
        number = num_reused = 0
        while number < 60 or running.llm.llm_engine.has_unfinished_requests():
            for _ in range(int(rng.integers(0, 3)) if number < 60 else 0):
                names[f"r{number}-"] = int(rng.integers(len(asks)))
                running.add(f"r{number}-", asks[names[f"r{number}-"]])
                number += 1
            if rng.random() < 0.06 and running.scheduler.requests:
                name = str(rng.choice(sorted(running.scheduler.requests)))
                name = name[: name.index("-") + 1]
                running.llm.llm_engine.abort_request([name])
                aborted.add(name)
            dropped += running.scheduler.prefixes.orders.drop
            for output in running.step():
                if output.finished:
                    got[output.request_id] = output
                    num_reused += (output.num_cached_tokens or 0) > 45
            check_states(running)
        running.step()
        check_states(running)
        running.check_pool_is_whole()
        assert got.keys() | aborted == names.keys()
        for name, output in got.items():
            if name not in aborted:
                assert list(output.outputs[0].token_ids) == alone[names[name]].token_ids, name
    assert preempted, "the pool was large enough: nothing was tested"
    assert dropped, "there was room for all states: nothing was tested"
    assert num_reused > 10, "too little was reused: nothing was tested"


@pytest.fixture(scope="module")
def hidrop(model: Path) -> Iterator[Engine]:
    with engine(model, CHOICES["hidrop"]) as started:
        yield started


@pytest.fixture
def running(hidrop: Engine) -> Engine:
    assert hidrop.llm.reset_prefix_cache()
    return hidrop


def test_a_reset_forgets_images(running: Engine) -> None:
    (ask, _), (other, _), *_ = conversation(np.random.default_rng(2), "9")
    running.ask([ask])
    assert running.runner.staged.states
    assert running.llm.reset_prefix_cache()
    assert reused(running.ask([other])[0]) == 0
    assert len(running.runner.staged.states) == 1


def test_evicted_blocks_are_missed_and_written_again(running: Engine) -> None:
    rng = np.random.default_rng(3)
    (ask, _), (other, _), *_ = conversation(rng, "9")
    cold = running.ask([ask])[0]
    same(running.ask([ask])[0], cold)
    entry = next(iter(running.scheduler.prefixes.entries.values()))
    block = entry.blocks[-1][-1][0] if entry.blocks[-1] else entry.blocks[0][-1][0]
    running.pool.evict_blocks({block.block_id})
    missed = running.ask([ask])[0]
    assert reused(missed) == 0
    same(missed, cold)
    assert reused(running.ask([other])[0]) == end_of_images(other.tokens, 1)
    check_states(running)


def test_images_of_requests_with_other_keeps_before_the_cut_are_not_reused(running: Engine) -> None:
    (ask, _), *_ = conversation(np.random.default_rng(4), "9")
    early = replace(ask, options={"hidrop_keep": ["all", "all", 20, 5, 0]})
    later = replace(ask, options={"hidrop_keep": [0, "all", 30, 6, 0]})
    cold = running.ask([early])[0]
    running.ask([ask])
    assert reused(running.ask([later])[0]) == end_of_images(ask.tokens, 1), "only keeps behind the cut differ"
    again = running.ask([early])[0]
    assert reused(again) == end_of_images(ask.tokens, 1)
    same(again, cold)
    off = running.ask([replace(ask, options={"hidrop": "off"})])[0]
    assert reused(off) == 0


def test_what_is_reused_is_reported_by_stage(running: Engine) -> None:
    (ask, _), (other, _), *_ = conversation(np.random.default_rng(6), "99999999")
    cold = running.ask([ask])[0].report
    report = running.ask([other])[0].report
    end = end_of_images(other.tokens, 1)
    assert report["encoded_images"] == 0
    assert report["prefill_flops"] < cold["prefill_flops"] < report["prefill_flops_dense"]
    stages = len(report["stages"])
    assert report["reused_tokens"] == end
    assert [stage["reused"] for stage in report["stages"]] == [end - TOKENS_PER_IMAGE, end] + [64] * (stages - 2)
    rows = sum((s["rows"] - s["reused"]) * (s["end_layer"] - s["first_layer"]) for s in report["stages"])
    assert report["layer_tokens"] == rows


def test_without_memory_for_states_images_are_reused_only_where_nothing_is_cut(model: Path) -> None:
    (ask, _), (other, _), *_ = conversation(np.random.default_rng(7), "9")
    with engine(model, CHOICES["fastv"] | {"prefix_state_bytes": 0}) as running:
        for each in (ask, other, ask):
            answer = running.ask([each])[0]
            assert reused(answer) == 0
            assert answer.report["reuse_off"] == "states"
        dropping = {"hidrop_keep": ["all", 0]}
        first, second = (running.ask([replace(each, options=dropping)])[0] for each in (ask, other))
        assert (reused(first), reused(second)) == (0, end_of_images(other.tokens, 1))
        assert second.report["reuse_off"] is None
        assert not running.runner.staged.states


def test_a_name_covers_what_the_kv_depends_on() -> None:
    def names(**changes: Any) -> list[bytes]:
        given: dict[str, Any] = {"tokens": (1, 2, 9, 9, 3), "identifier": "a", "salt": None, "kept": ((2,), (1,))}
        given |= changes
        feature = SimpleNamespace(identifier=given["identifier"], mm_position=SimpleNamespace(offset=2))
        request = SimpleNamespace(
            prompt_token_ids=given["tokens"], mm_features=[feature], cache_salt=given["salt"], request_id="r"
        )
        return [key for key, _ in prefix_keys(request, Plan(5, (Span(2, 2),), given["kept"]))]

    assert names() == names(tokens=(1, 2, 9, 9, 4)) != names(tokens=(1, 3, 9, 9, 3))
    different: list[dict[str, Any]] = [
        {"identifier": "b"},
        {"salt": "s"},
        {"kept": ((0,), (0,))},
        {"kept": ((1,), (1,))},
    ]
    assert len({tuple(names(**change)) for change in different} | {tuple(names())}) == 5
