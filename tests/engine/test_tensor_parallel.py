"""Two tensor-parallel workers on loopback: the rows, tokens and reports of one, on both ranks.

Also the multi-process executor with one worker, against the engine in one process.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import envs

from tests.engine.harness import Answer, Ask, Engine, engine, prompt
from vllm_hidrop.staged.image_runs import ImageRun
from vllm_hidrop.staged.loop import StagedLoop
from vllm_hidrop.verify.tiny_models import NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

SHAPE = {"shape": [NUM_LAYERS, TOKENS_PER_IMAGE]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # Two KV heads, one per rank. Requests may also use FastV, which scores under the layer before.
    "hidrop": (
        "mistral-clip",
        {"inject_layer": 1, "filter_layers": [2, 4], "keeps": [20, 5], "exit_layer": 7},
    ),
    # One KV head, on both ranks; attention edits, verdicts by value-aware statistics, blocks given back.
    "visipruner": ("qwen2-siglip", {"shallow_layers": 2, "cosine": 0.8, "norm": 0.4}),
    # Four KV heads; attention of all text rows, a tower that merges, caches closed up.
    "mustdrop": ("llama-clip", {"merge_threshold": 0.2, "merge_window": 2, "filter_layers": [1, 3, 5]}),
}
Answers = tuple[list[Answer], list[list[list[int]]]]
"""To one batch, asked twice, and by rank the rows that every cut left."""
LAYOUTS = {"3i5": 1, "2ii3": 2, "9": 0, "i7": 1, "99999i6": 1, "5i2i6": 2}


def choice(name: str) -> dict[str, Any]:
    preset = {"preset": "tok64"} if name == "mustdrop" else {}
    return {"method": name, "options": SHAPE | CASES[name][1]} | preset


def asks(name: str) -> list[Ask]:
    """Requests of one batch: pruned, text, and every second one ``off``."""
    rng = np.random.default_rng(5)
    found = []
    for number, (layout, images) in enumerate(LAYOUTS.items()):
        tokens, seeds = prompt(rng, layout), tuple(range(10 * number, 10 * number + images))
        other = {"hidrop_method": "fastv"} if name == "hidrop" and number % 2 else {}
        found += [Ask(tokens, seeds, other), Ask(tokens, seeds, {"hidrop": "off"})]
    return found


def start_recording(worker: Any) -> None:
    """Runs in a worker: from now on remember the rows that every cut of every step leaves."""
    worker.cuts = []
    worker.cut = cut = StagedLoop.cut

    def recording(loop: StagedLoop, stage: int, runs: list[ImageRun]) -> torch.Tensor | None:
        kept = cut(loop, stage, runs)
        if kept is not None:
            worker.cuts.append(loop.rows.full.tolist())
        return kept

    StagedLoop.cut = recording  # type: ignore[method-assign, assignment]


def recorded(worker: Any) -> list[list[int]]:
    """Runs in a worker, which records no longer."""
    StagedLoop.cut = worker.cut  # type: ignore[method-assign]
    cuts: list[list[int]] = worker.cuts
    return cuts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, (parts, _) in CASES.items():
        text, tower = parts.split("-")
        found[name] = make_llava(tmp_path_factory.mktemp(name), text, tower)
    return found


@contextmanager
def workers(
    model: Path, hidrop: dict[str, Any] | None, number: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """An engine with so many worker processes, each on one core."""
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(cores[i % len(cores)]) for i in range(number)))
    envs.disable_envs_cache()
    with engine(model, hidrop, distributed_executor_backend="mp", tensor_parallel_size=number) as running:
        yield running


def answered(running: Engine, asked: list[Ask]) -> Answers:
    executor = running.core.model_executor
    executor.collective_rpc(start_recording)
    return running.ask(asked) + running.ask(asked), executor.collective_rpc(recorded)


def check_equal(found: list[Answer], expected: list[Answer]) -> None:
    for answer, other in zip(found, expected, strict=True):
        assert answer.token_ids == other.token_ids
        torch.testing.assert_close(answer.logits, other.logits, atol=1e-4, rtol=1e-4)
        unlike = {"selection_ms": 0, "kv_bytes": 0, "kv_bytes_dense": 0}
        assert answer.report | unlike == other.report | unlike
        for name in (
            "kv_bytes",
            "kv_bytes_dense",
        ):  # two ranks each hold a key/value head of its own, or both the only one
            assert answer.report[name] in (other.report[name], 2 * other.report[name])


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> Callable[[str], Answers]:
    """By case, what one rank in this process answers."""

    @cache
    def found(name: str) -> Answers:
        with engine(models[name], choice(name)) as running:
            return answered(running, asks(name))

    return found


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_select_and_answer_as_one_does(
    models: dict[str, Path], alone: Callable[[str], Answers], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, (cuts,) = alone(name)
    assert cuts
    with workers(models[name], choice(name), 2, monkeypatch) as running:
        answers, by_rank = answered(running, asks(name))
    assert by_rank == [cuts, cuts]
    check_equal(answers, expected)
    assert {answer.report["mode"] for answer in answers} == {"pruned", "off", "text"}
    # The second time, the text before an image is cached, by each rank for its heads; verdicts need whole prompts.
    again = [answer for answer in answers[len(answers) // 2 :] if answer.report["mode"] == "pruned"]
    assert any(answer.cached_tokens for answer in again) == (name == "hidrop")
    returned = sum(answer.report["kv_blocks_returned"] for answer in answers)
    assert bool(returned) == (name in ("visipruner", "mustdrop"))


def test_off_on_two_ranks_equals_stock_on_two_ranks(
    models: dict[str, Path], alone: Callable[[str], Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    with workers(models["hidrop"], None, 2, monkeypatch) as running:
        stock = running.ask(asks("hidrop")[1::2])
    # One rank's beside pruned requests, which two ranks' are equal to by the test above.
    dense = alone("hidrop")[0][1 : 2 * len(LAYOUTS) : 2]
    assert [answer.token_ids for answer in stock] == [answer.token_ids for answer in dense]


def test_a_worker_process_answers_as_the_engine_in_one_process(
    models: dict[str, Path], alone: Callable[[str], Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, cuts = alone("hidrop")
    with workers(models["hidrop"], choice("hidrop"), 1, monkeypatch) as running:
        answers, by_rank = answered(running, asks("hidrop"))
    assert by_rank == cuts
    check_equal(answers, expected)
