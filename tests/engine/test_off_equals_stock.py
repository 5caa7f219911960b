"""``off``, ``none`` and text-only requests give stock vLLM's tokens, alone and beside pruned requests."""

from pathlib import Path

import numpy as np
import pytest

from tests.engine.harness import Ask, engine, prompt
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

NUM_TOKENS = 32
HIDROP = {"method": "hidrop", "preset": "tok48", "options": {"scale": True}}
LAYOUTS = {
    0: ["9", "99", "1", "5", "999", "9999"],
    1: ["i9", "5i5", "9i", "99i3", "i1", "1i99"],
    2: ["ii9", "5i5i5", "9ii", "i9i", "3ii4", "i5i5"],
    4: ["iiii9", "2i2i2i2i2", "9iiii", "ii9ii", "4iiii4", "i3i3i3i3"],
}
PROMPTS = [(layout, images) for images, layouts in LAYOUTS.items() for layout in layouts]


def asks(options: dict[str, str]) -> list[Ask]:
    rng = np.random.default_rng(11)
    return [
        Ask(prompt(rng, layout), tuple(range(100 * i, 100 * i + images)), options, NUM_TOKENS)
        for i, (layout, images) in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), "mistral")


@pytest.fixture(scope="module")
def stock(model: Path) -> list[list[int]]:
    with engine(model, None) as running:
        return [answer.token_ids for answer in running.ask(asks({}))]


def test_off_equals_stock_token_for_token(model: Path, stock: list[list[int]]) -> None:
    with engine(model, HIDROP) as running:
        answers = running.ask(asks({"hidrop": "off"}))
    assert [answer.token_ids for answer in answers] == stock
    assert all(len(tokens) == NUM_TOKENS for tokens in stock)
    modes = {answer.report["mode"] for answer in answers}
    assert modes == {"off", "text"}
    assert all(answer.report["kv_blocks"] == answer.report["kv_blocks_dense"] for answer in answers)


def test_method_none_equals_stock_token_for_token(model: Path, stock: list[list[int]]) -> None:
    with engine(model, {"method": "none"}) as running:
        assert [answer.token_ids for answer in running.ask(asks({}))] == stock


def test_off_equals_stock_beside_pruned_requests(model: Path, stock: list[list[int]]) -> None:
    mixed = [ask for pair in zip(asks({"hidrop": "off"}), asks({}), strict=True) for ask in pair]
    with engine(model, HIDROP) as running:
        answers = running.ask(mixed)
    assert [answer.token_ids for answer in answers[::2]] == stock
    pruned = [answer.token_ids for answer in answers[1::2]]
    assert sum(a != b for a, b in zip(pruned, stock, strict=True)) > len(stock) / 3, "nothing was pruned"
