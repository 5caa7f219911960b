"""A pruned prompt whose first text is cached, or ran in an earlier step, against the dense reference and a cold run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.harness import Answer, Ask, Engine, engine, prompt
from tests.engine.test_blocks import count_preemptions, record_chunks
from tests.engine.test_oracle_parity import OWN, check_equal, reference, selections_of
from vllm_hidrop.verify.tiny_models import IMAGE_TOKEN, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

BLOCK = 32
TEXT_ONLY = {"prefix_state_bytes": 0}
"""Images are not reused: see ``test_image_prefix``."""
PREFIX = "999999999"  # 81 tokens and the first one: two blocks and 18 tokens
NUM_PREFIX = 82
REUSED = 64
HIDROP = {
    "method": "hidrop",
    "options": OWN | {"inject_layer": 3, "filter_layers": [4, 6], "keeps": [20, 5], "exit_layer": 8},
}
CHOICES: dict[str, dict[str, Any]] = {
    "hidrop": HIDROP,
    "fastv": {"method": "fastv", "options": {"layer": 2, "keep": 9}},
    "pyramiddrop": {"method": "pyramiddrop", "options": {"cuts": [0.25, 0.5], "keeps": [30, 3]}},
    "hidrop-compacted": HIDROP | {"positions": "compacted"},
    "fastv-grouped": {"method": "fastv", "options": {"layer": 2, "keep": 9}, "positions": "grouped"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), "mistral")


@pytest.fixture(scope="module")  # the tests with engines of their own come first: one lives at a time
def hidrop(model: Path) -> Iterator[Engine]:
    with engine(model, HIDROP | TEXT_ONLY) as started:
        yield started


@pytest.fixture
def running(hidrop: Engine) -> Engine:
    """The shared engine without anything cached."""
    assert hidrop.llm.reset_prefix_cache()
    return hidrop


def shared(rng: np.random.Generator, *layouts: str) -> list[tuple[int, ...]]:
    """Prompts that begin with the same text."""
    start = prompt(rng, PREFIX)
    return [start + prompt(rng, layout)[1:] for layout in layouts]


@contextmanager
def budget(running: Engine, num_tokens: int) -> Iterator[None]:
    """While entered, a step holds so many tokens."""
    before = running.scheduler.max_num_scheduled_tokens
    running.scheduler.max_num_scheduled_tokens = num_tokens
    try:
        yield
    finally:
        running.scheduler.max_num_scheduled_tokens = before


def reused(answer: Answer) -> int:
    """Tokens reused, by our report and by vLLM's count."""
    assert answer.report["reused_tokens"] == answer.cached_tokens
    return answer.cached_tokens


@pytest.mark.parametrize("choice", CHOICES.values(), ids=list(CHOICES))
def test_a_hit_and_a_chunked_prefix_change_nothing(model: Path, choice: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    first, second, third = shared(rng, "i5", "i3i6", "ii9")
    asks = [Ask(first, (1,)), Ask(second, (2, 3)), Ask(third, (4, 4)), Ask(first, (5,)), Ask(second, (1, 4))]
    expected = [reference(model, choice, ask) for ask in asks]
    with engine(model, choice | TEXT_ONLY) as running:
        for turn, (ask, result) in enumerate(zip(asks, expected, strict=True)):
            with running.record_selections() as kept:
                answer = running.ask([ask])[0]
            check_equal(answer, result)
            assert kept == selections_of([result])
            assert reused(answer) == (REUSED if turn else 0)
        for chunk in (BLOCK, 41, NUM_PREFIX):
            assert running.llm.reset_prefix_cache()
            for ask, result in zip(asks[:2], expected[:2], strict=True):
                length = (
                    NUM_PREFIX + len(ask.images) * TOKENS_PER_IMAGE + len(ask.tokens) - NUM_PREFIX - len(ask.images)
                )
                with budget(running, max(chunk, length - NUM_PREFIX)), running.record_selections() as kept:
                    check_equal(running.ask([ask])[0], result)
                assert kept == selections_of([result])
        chunks = record_chunks(running)
        dense = [Ask(prompt(rng, "99i" + "9" * 7), (7,), {"hidrop": "off"}), Ask(prompt(rng, "9" * 20))]
        alone = [running.ask([ask])[0] for ask in dense]
        for num_tokens in (190, 230, 400):
            assert running.llm.reset_prefix_cache()
            chunks.clear()
            with budget(running, num_tokens):
                answers = running.ask([dense[0], *asks, dense[1], *asks])
            split = [first for _, first, n in chunks if 0 < first <= NUM_PREFIX < first + n]
            assert split, "no prefix ran before its prompt"
            for answer, result in zip(answers[1:6] + answers[7:], expected * 2, strict=True):
                check_equal(answer, result)
            for answer, one in zip((answers[0], answers[6]), alone, strict=True):
                assert answer.token_ids == one.token_ids
        running.check_pool_is_whole()


def test_a_server_without_prefix_caching_says_so_and_chunks(model: Path) -> None:
    (tokens,) = shared(np.random.default_rng(6), "i9")
    ask = Ask(tokens, (1,))
    with engine(model, HIDROP | TEXT_ONLY, enable_prefix_caching=False) as running:
        chunks = record_chunks(running)
        whole = running.ask([ask])[0]
        with budget(running, 80):
            split = running.ask([ask])[0]
    assert [(first, n) for _, first, n in chunks if n > 1] == [(0, 155), (0, 80), (80, 75)]
    assert split.token_ids == whole.token_ids
    assert reused(split) == 0
    assert split.report["reuse_off"] == "disabled"


def test_preempted_requests_with_a_common_prefix_resume_with_the_same_tokens(model: Path) -> None:
    rng = np.random.default_rng(9)
    prompts = shared(rng, "i5", "i3i6", "i2", "ii4")
    asks = [Ask(tokens, (1, 2)[: tokens.count(IMAGE_TOKEN)], max_tokens=40) for tokens in prompts]
    asks += [replace(asks[0], options={"hidrop": "off"})]
    with engine(model, HIDROP | TEXT_ONLY, num_gpu_blocks_override=90, max_model_len=320) as running:
        alone = [running.ask([ask])[0] for ask in asks]
        preempted = count_preemptions(running)
        answers = running.ask(asks)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
        assert preempted, "the pool was large enough: nothing was tested"
        running.check_pool_is_whole()


def test_what_off_requests_cache_of_an_image_pruned_ones_never_reuse(running: Engine) -> None:
    (tokens,) = shared(np.random.default_rng(2), "i9")
    pruned, dense = Ask(tokens, (1,)), Ask(tokens, (1,), {"hidrop": "off"})
    length = len(tokens) - 1 + TOKENS_PER_IMAGE
    cold = running.ask([pruned])[0]
    first = running.ask([dense])[0]
    assert reused(first) == REUSED
    again = running.ask([dense])[0]
    assert reused(again) == (length - 1) // BLOCK * BLOCK
    assert again.token_ids == first.token_ids
    for _ in range(2):
        hit = running.ask([pruned])[0]
        assert reused(hit) == REUSED
        assert hit.token_ids == cold.token_ids
        torch.testing.assert_close(hit.logits, cold.logits, atol=1e-4, rtol=1e-4)
    other = running.ask([replace(dense, images=(2,))])[0]
    assert reused(other) == REUSED, "another image was taken for this one"


def test_generated_tokens_of_a_pruned_request_are_never_cached(running: Engine) -> None:
    (tokens,) = shared(np.random.default_rng(3), "i9")
    ask = Ask(tokens, (1,), max_tokens=70)
    answer = running.ask([ask])[0]
    longer = replace(ask, tokens=(*tokens, *answer.token_ids[:-1]), max_tokens=3)
    for options in ({}, {"hidrop": "off"}):
        assert reused(running.ask([replace(longer, options=options)])[0]) == REUSED


def test_blocks_written_in_the_same_step_are_not_read(running: Engine) -> None:
    first, second = shared(np.random.default_rng(4), "i5", "i7")
    together = running.ask([Ask(first, (1,)), Ask(second, (2,))])
    assert [reused(answer) for answer in together] == [0, 0]
    for answer, ask in zip(together, (Ask(first, (1,)), Ask(second, (2,))), strict=True):
        hit = running.ask([ask])[0]
        assert reused(hit) == REUSED
        torch.testing.assert_close(answer.logits, hit.logits, atol=1e-4, rtol=1e-4)


def test_the_report_counts_what_ran_and_what_was_reused(running: Engine) -> None:
    (tokens,) = shared(np.random.default_rng(5), "i9")
    cold, hit = (running.ask([Ask(tokens, (1,))])[0].report for _ in range(2))
    assert cold["reuse_off"] == hit["reuse_off"] == "states"
    assert [stage["reused"] for stage in hit["stages"]] == [REUSED] * len(hit["stages"])
    assert [stage["rows"] for stage in hit["stages"]] == [stage["rows"] for stage in cold["stages"]]
    assert cold["layer_tokens"] - hit["layer_tokens"] == 8 * REUSED
    assert cold["layer_tokens"] == sum(s["rows"] * (s["end_layer"] - s["first_layer"]) for s in cold["stages"])
    assert hit["kv_blocks"] == cold["kv_blocks"]


def test_a_prefix_runs_in_what_room_is_left_and_the_rest_in_one_step(running: Engine) -> None:
    """Rule 2: decodes go on, the prefix fills steps up, the rest runs when a step has room, and nobody overtakes."""
    rng = np.random.default_rng(7)
    (tokens,) = shared(rng, "i9")  # 82 tokens, then 73 in one step
    chunks = record_chunks(running)
    with budget(running, 80):
        running.add("decode", Ask(prompt(rng, "9"), max_tokens=12))
        running.step()
        running.add("long", Ask(tokens, (1,), max_tokens=3))
        running.add("text", Ask(prompt(rng, "9" * 20), max_tokens=2))  # 181 tokens
        running.add("late", Ask(prompt(rng, "i9"), (2,), max_tokens=2))  # 74 tokens
        table = []
        while running.scheduler.requests:
            chunks.clear()
            running.step()
            table.append([(name.rsplit("-", 1)[0], n) for name, _, n in chunks])
    assert table[:7] == [
        [("decode", 1), ("long", 79)],
        [("decode", 1), ("long", 76), ("text", 3)],
        [("decode", 1), ("long", 1), ("text", 78)],
        [("decode", 1), ("long", 1), ("text", 78)],
        [("decode", 1), ("text", 22), ("late", 1)],
        [("decode", 1), ("text", 1), ("late", 73)],
        [("decode", 1), ("late", 1)],
    ]
    assert [n for row in table for name, n in row if name == "decode"] == [1] * 11


def test_a_long_prompt_that_waits_for_room_is_not_overtaken_by_short_ones(running: Engine) -> None:
    """Rule 2: the rest needs the whole step; those behind it in line get what it cannot use, not its turn."""
    rng = np.random.default_rng(8)
    (tokens,) = shared(rng, "i9")
    chunks = record_chunks(running)
    with budget(running, 73):
        running.add("decode", Ask(prompt(rng, "9"), max_tokens=6))
        running.step()
        running.add("long", Ask(tokens, (1,), max_tokens=2))
        for number in range(40):
            running.add(f"short{number}", Ask(prompt(rng, "99"), max_tokens=2))
        while running.scheduler.requests:
            running.step()
    order = [(name.split("-")[0], n) for name, _, n in chunks]
    (rest,) = (place for place, found in enumerate(order) if found == ("long", 73))
    decodes = [place for place, (name, _) in enumerate(order) if name == "decode"]
    assert len(decodes) == 6
    assert decodes[-1] < rest, "the rest does not fit beside a decode"
    assert {name for name, _ in order[decodes[-1] + 1 : rest]} <= {name for name, n in order[:rest] if n > 1}
    assert rest < len(order) / 2, "short requests overtook the long one"
