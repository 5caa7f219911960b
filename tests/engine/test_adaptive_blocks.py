"""Methods that decide their own counts: blocks held at every step, preemption, aborts, mixed batches, bad numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.harness import Ask, Engine, engine, prompt
from tests.engine.test_blocks import blocks_held, count_preemptions, internal_id
from vllm_hidrop.verify.tiny_models import NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

BLOCK = 32
SHAPE = {"shape": [NUM_LAYERS, TOKENS_PER_IMAGE]}
VISIPRUNER = {
    "method": "visipruner",
    "options": SHAPE | {"shallow_layers": 2, "cosine": 0.96, "norm": 0.3, "exit_cosine": 0.98},
}
MUSTDROP = {
    "method": "mustdrop",
    "options": SHAPE
    | {
        "filter_layers": [1, 3, 5],
        "global_threshold": 0.014,
        "individual_threshold": 0.03,
        "merge_threshold": 0.2,
        "merge_window": 2,
    },
}
CHOICES = {"visipruner": VISIPRUNER, "mustdrop": MUSTDROP}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def stock(model: Path) -> Iterator[list[list[int]]]:
    with engine(model, None) as running:
        yield [answer.token_ids for answer in running.ask(asks({}))]


@pytest.fixture(params=sorted(CHOICES))
def choice(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CHOICES[request.param]


def asks(options: dict[str, Any]) -> list[Ask]:
    rng = np.random.default_rng(5)
    layouts = ("3i5", "i9", "2ii4", "9", "i1i1")
    return [Ask(prompt(rng, each), tuple(range(each.count("i"))), options, max_tokens=24) for each in layouts]


def test_off_equals_stock_beside_pruned_requests_of_the_same_images(
    model: Path, stock: list[list[int]], choice: dict[str, Any]
) -> None:
    with engine(model, choice) as running:
        pruned_alone = [running.ask([ask])[0].token_ids for ask in asks({})]
        mixed = running.ask([ask for pair in zip(asks({"hidrop": "off"}), asks({}), strict=True) for ask in pair])
    assert [answer.token_ids for answer in mixed[::2]] == stock
    assert [answer.token_ids for answer in mixed[1::2]] == pruned_alone
    assert pruned_alone != stock


def test_decode_holds_the_survivors_and_blocks_return_with_the_first_token(model: Path, choice: dict[str, Any]) -> None:
    tokens = prompt(np.random.default_rng(0), "9ii9")
    with engine(model, choice) as running:
        free = running.pool.get_num_free_blocks()
        running.add("a", Ask(tokens, (1, 2), max_tokens=20))
        stages: list[dict[str, Any]] = []
        for step in range(20):
            outputs = running.step()
            if not running.scheduler.requests:
                break
            stages = stages or outputs[0].kv_transfer_params["hidrop"]["stages"]
            held = blocks_held(running, internal_id(running, "a"))
            expected = {i: {-(-(19 + step + stage["cached"]) // BLOCK)} for i, stage in enumerate(stages)}
            assert held == expected, f"step {step}"
            managers = running.scheduler.kv_cache_manager.coordinator.single_type_managers
            taken = sum(len(blocks) for manager in managers for blocks in manager.req_to_blocks.values())
            assert running.pool.get_num_free_blocks() == free - taken
        report = outputs[0].kv_transfer_params["hidrop"]
    assert report["kv_blocks"] < report["kv_blocks_dense"]
    assert report["kv_blocks_returned"] > 0
    assert report["cut_layer"] is not None


def test_a_preempted_request_decides_the_same_and_gives_the_same_tokens(model: Path, choice: dict[str, Any]) -> None:
    rng = np.random.default_rng(6)
    requests = [Ask(prompt(rng, "5i5"), (i,), max_tokens=90) for i in range(5)]
    requests += [Ask(prompt(rng, "5i5"), (1,), {"hidrop": "off"}, max_tokens=90)]
    with engine(model, choice) as roomy:
        expected = [roomy.ask([ask])[0].token_ids for ask in requests]
    small = {"num_gpu_blocks_override": 90, "max_model_len": 256, "max_num_batched_tokens": 1024}
    with engine(model, choice, **small) as tight:
        preempted = count_preemptions(tight)
        survivors = record_all_survivors(tight)
        answers = tight.ask(requests)
    assert preempted, "the pool was large enough: nothing was tested"
    assert any(len(runs) > 1 for runs in survivors.values()), "no prompt ran twice"
    assert all(runs[0] == again for runs in survivors.values() for again in runs)
    assert [answer.token_ids for answer in answers] == expected


def record_all_survivors(running: Engine) -> dict[str, list[Any]]:
    """Every decision on every request, preempted ones again."""
    found: dict[str, list[Any]] = {}
    ran = running.runner.staged.ran

    def recording(outcome: Any) -> Any:
        for name, stages in outcome.survivors.items():
            found.setdefault(name, []).append([[image.tolist() for image in stage] for stage in stages])
        return ran(outcome)

    running.runner.staged.ran = recording
    return found


def test_abort_in_every_state_gives_all_blocks_back(model: Path, choice: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    with engine(model, choice) as running:
        for num_steps in (0, 1, 3):
            running.add(f"x{num_steps}", Ask(prompt(rng, "3i5"), (1,), max_tokens=50))
            for _ in range(num_steps):
                running.step()
            running.llm.llm_engine.abort_request([f"x{num_steps}"])
            running.step()
            running.check_pool_is_whole()
        running.ask([Ask(prompt(rng, "9"))])
        assert len(running.runner.staged.records) <= 1
        assert len(running.runner.staged.reduced) <= len(running.runner.encoder_cache)


def test_a_prompt_that_ends_with_an_image_runs_dense_and_says_so(model: Path, choice: dict[str, Any]) -> None:
    ask = Ask(prompt(np.random.default_rng(5), "3i"), (1,))
    with engine(model, None) as running:
        expected = running.ask([ask])[0].token_ids
    with engine(model, choice) as running:
        answer = running.ask([ask])[0]
    assert answer.report["mode"] == "fallback"
    assert answer.token_ids == expected


def test_requests_of_one_step_may_use_different_methods(model: Path) -> None:
    """Every cut of these falls on a stage of this server, so each is what it would be on a server of its own."""
    others = {name: {"method": name} for name in ("pyramiddrop", "random", "fastv", "uniform")}
    tokens = prompt(np.random.default_rng(9), "3i5")
    expected = {}
    for name, of_its_own in others.items():
        with engine(model, of_its_own) as running:
            expected[name] = running.ask([Ask(tokens, (3,))])[0]
    server = {"method": "visipruner", "options": SHAPE | {"shallow_layers": 0, "cosine": 0.96, "norm": 0.3}}
    with engine(model, server) as running:
        alone = running.ask([Ask(tokens, (3,))])[0]
        wishes: list[dict[str, Any]] = [{"hidrop_method": name} for name in others]
        *answers, own, off = running.ask([Ask(tokens, (3,), wish) for wish in [*wishes, {}, {"hidrop": "off"}]])
    assert own.token_ids == alone.token_ids
    for name, answer in zip(others, answers, strict=True):
        assert answer.report["method"] == name
        assert answer.token_ids == expected[name].token_ids
        torch.testing.assert_close(answer.logits, expected[name].logits, atol=1e-4, rtol=1e-4)
        assert answer.report["layer_tokens"] == expected[name].report["layer_tokens"]
    assert off.report["mode"] == "off"


def test_what_a_method_cannot_honour_is_refused(model: Path) -> None:
    tokens = prompt(np.random.default_rng(9), "3i5")
    bad: list[dict[str, Any]] = [
        {"hidrop_keep": ["all"] * 5},
        {"hidrop_method": "hidrop"},
        {"hidrop_method": "mustdrop"},
        {"hidrop_method": 3},
    ]
    with engine(model, VISIPRUNER) as running:
        answers = running.ask([Ask(tokens, (3,), wish) for wish in bad])
    assert [answer.finish_reason for answer in answers] == ["error"] * len(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_bad_numbers_in_the_image_harm_nobody(
    model: Path, choice: dict[str, Any], value: float, tmp_path: Path
) -> None:
    """Projector rows that are all NaN, infinite or equal: defined decisions, every block back, text unharmed."""
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    for name in ("weight", "bias"):
        full = f"multi_modal_projector.linear_2.{name}"
        weights[full] = torch.full_like(weights[full], value if name == "bias" else 0.0)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    text = Ask(prompt(np.random.default_rng(2), "9"))
    with engine(tmp_path, choice) as running:
        alone = running.ask([text])[0].token_ids
        image, beside = running.ask([Ask(prompt(np.random.default_rng(3), "3i5"), (1,)), text])
        again = running.ask([text])[0]
        report = image.report
    assert beside.token_ids == again.token_ids == alone
    kept = [stage["kept"] for stage in report["stages"]]
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("cache", ["fp8_e4m3", "fp8_e5m2"])
def test_an_fp8_cache_gives_stocks_tokens_and_survives_preemption(
    model: Path, choice: dict[str, Any], cache: str
) -> None:
    settings: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_dtype": cache}
    with engine(model, None, **settings) as running:
        stock = [running.ask([ask])[0].token_ids for ask in asks({})]
    with engine(model, choice, **settings) as running:
        assert [running.ask([ask])[0].token_ids for ask in asks({"hidrop": "off"})] == stock
        ask = asks({})[2]
        alone = running.ask([ask])[0]
        running.add("again", ask)
        for _ in range(5):
            running.step()
        request = running.scheduler.running.pop()
        running.scheduler._preempt_request(request, 0.0)
        while running.llm.llm_engine.has_unfinished_requests():
            outputs = running.step()
    assert list(outputs[0].outputs[0].token_ids) == alone.token_ids
    assert alone.report["kv_blocks"] < alone.report["kv_blocks_dense"]
