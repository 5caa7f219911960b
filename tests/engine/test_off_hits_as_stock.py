"""``off``, ``none`` and text requests find in the prefix cache what stock vLLM finds, turn by turn."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.core.kv_cache_utils import get_block_hash

from tests.engine.harness import Ask, Engine, engine, prompt
from vllm_hidrop.verify.tiny_models import IMAGE_TOKEN, make_llava

pytestmark = pytest.mark.engine

HIDROP = {"method": "hidrop", "preset": "tok48", "options": {"scale": True}}
TURNS = 5
ANSWER_TOKENS = 40
"""More than a block: answers fill blocks, too."""


@dataclass
class Turn:
    """What one turn found, answered, encoded, and the names of all blocks that were cached after it."""

    cached_tokens: int
    token_ids: list[int]
    num_encoded: int
    blocks: frozenset[bytes] = field(repr=False)


@contextmanager
def counting(running: Engine) -> Iterator[list[int]]:
    """How many images every run of the tower encodes."""
    runs: list[int] = []
    model = running.runner.model
    encode = model.embed_multimodal

    def counted(**kwargs: Any) -> Any:
        runs.append(len(kwargs["pixel_values"]))
        return encode(**kwargs)

    model.embed_multimodal = counted
    try:
        yield runs
    finally:
        del model.embed_multimodal


def cached_blocks(running: Engine) -> frozenset[bytes]:
    return frozenset(bytes(get_block_hash(each.block_hash)) for each in running.pool.blocks if each.block_hash)


def chat(running: Engine, layouts: list[str], options: dict[str, str]) -> list[Turn]:
    """A conversation: every turn repeats all before it, the answers included."""
    rng = np.random.default_rng(5)
    history: tuple[int, ...] = prompt(rng, "9")
    turns = []
    for layout in layouts:
        history += prompt(rng, layout)[1:]
        images = tuple(seed // 2 for seed in range(history.count(IMAGE_TOKEN)))
        with counting(running) as runs:
            answer = running.ask([Ask(history, images, options, ANSWER_TOKENS)])[0]
        turns.append(Turn(answer.cached_tokens, answer.token_ids, sum(runs), cached_blocks(running)))
        history += tuple(answer.token_ids)
    return turns


CHATS = {
    "an image first": ["i9", "9", "9", "i3", "99"],
    "images in every turn": ["9i9"] * TURNS,
    "an image twice and late": ["ii99", "9", "i5", "999", "9"],
    "text": ["99", "9", "99", "9", "9"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), "mistral")


def chats(running: Engine, options: dict[str, str]) -> dict[str, list[Turn]]:
    found = {}
    for name, layouts in CHATS.items():
        assert running.llm.reset_prefix_cache()
        running.llm.llm_engine.reset_encoder_cache()
        found[name] = chat(running, layouts, options)
    return found


@pytest.fixture(scope="module")
def stock(model: Path) -> dict[str, list[Turn]]:
    with engine(model, None) as running:
        return chats(running, {})


def test_stock_reuses_answers_too(stock: dict[str, list[Turn]]) -> None:
    """Else the tests below would show little."""
    for turns in stock.values():
        assert len(turns) == TURNS
        assert all(later.cached_tokens > sooner.cached_tokens for sooner, later in pairwise(turns))


@pytest.mark.parametrize("choice", [HIDROP, {"method": "none"}], ids=["off", "none"])
def test_every_turn_finds_what_stock_finds(model: Path, stock: dict[str, list[Turn]], choice: dict[str, Any]) -> None:
    options = {"hidrop": "off"} if choice is HIDROP else {}
    with engine(model, choice) as running:
        assert chats(running, options) == stock


def test_a_pruned_request_between_the_turns_changes_nothing(model: Path, stock: dict[str, list[Turn]]) -> None:
    """Its image is encoded in its own way, and its blocks have other names."""
    with engine(model, HIDROP) as running:
        for name, turns in stock.items():
            assert running.llm.reset_prefix_cache()
            running.llm.llm_engine.reset_encoder_cache()
            ask = running.ask
            rng = np.random.default_rng(5)
            start = prompt(rng, "9") + prompt(rng, CHATS[name][0])[1:]
            pruned = Ask(start, tuple(seed // 2 for seed in range(start.count(IMAGE_TOKEN))))
            if pruned.images:
                ask([replace(pruned, tokens=(*pruned.tokens, 7))])
            found = chat(running, CHATS[name], {"hidrop": "off"})
            assert [turn.token_ids for turn in found] == [turn.token_ids for turn in turns]
            assert [turn.num_encoded for turn in found] == [turn.num_encoded for turn in turns]


def test_several_choices_share_one_run_of_the_tower(model: Path) -> None:
    """In one process they share the very features; a name that is changed in place would be changed for each."""
    tokens = prompt(np.random.default_rng(6), "9i9")
    with engine(model, HIDROP) as running:
        for options in ({"hidrop": "off"}, {}):
            running.llm.llm_engine.reset_encoder_cache()
            asked = Ask(tokens, (1,), options)
            params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=4, extra_args=dict(options))
            with counting(running) as runs:
                running.llm.generate([running.prompt(asked)], [params], use_tqdm=False)
            assert sum(runs) == 1
