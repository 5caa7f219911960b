"""Blocks held per stage at every step, and that every block comes back: finish, abort, preemption, error."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.harness import Ask, Engine, engine, prompt
from vllm_hidrop.verify.tiny_models import NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

BLOCK = 32
KEEPS = {0: 0, 2: "all", 3: 20, 5: 3, 6: 0}
HIDROP = {
    "method": "hidrop",
    "options": {
        "shape": [NUM_LAYERS, TOKENS_PER_IMAGE],
        "inject_layer": 3,
        "filter_layers": [3, 5],
        "keeps": [20, 3],
        "exit_layer": 7,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def running(model: Path) -> Iterator[Engine]:
    with engine(model, HIDROP) as started:
        yield started


def blocks_held(running: Engine, request_id: str) -> dict[int, set[int]]:
    """Blocks of one layer's cache per stage; all groups of a stage hold the same number."""
    held: dict[int, set[int]] = {}
    for manager in running.scheduler.kv_cache_manager.coordinator.single_type_managers:
        blocks = manager.req_to_blocks.get(request_id, ())
        held.setdefault(manager.kv_cache_spec.stage, set()).add(len(blocks))
    return held


def internal_id(running: Engine, name: str) -> str:
    return next(key for key in running.scheduler.requests if key.startswith(name))


def test_blocks_equal_the_plan_at_every_step(running: Engine) -> None:
    # 1 + 9 + 9 text tokens and 128 vision tokens; text 19, then one more token a step.
    running.add("a", Ask(prompt(np.random.default_rng(0), "9ii9"), (1, 2), max_tokens=30))
    text, vision = 19, 2 * TOKENS_PER_IMAGE
    request = None
    for step in range(30):
        running.step()
        if not running.scheduler.requests:
            break
        request = request or internal_id(running, "a")
        tokens = [text + step + kept for kept in (0, vision, 40, 6, 0)]
        expected = {stage: {-(-n // BLOCK)} for stage, n in enumerate(tokens)}
        assert blocks_held(running, request) == expected, f"step {step}"
    assert step == 29
    running.check_pool_is_whole()


def test_groups_are_stages(running: Engine) -> None:
    groups = running.scheduler.kv_cache_config.kv_cache_groups
    layers = {0: 2, 1: 1, 2: 2, 3: 1, 4: 2}
    found: dict[int, int] = {}
    for group in groups:
        stage = group.kv_cache_spec.stage
        found[stage] = found.get(stage, 0) + len(group.layer_names)
    assert found == layers


def test_abort_in_every_state_gives_all_blocks_back(running: Engine) -> None:
    rng = np.random.default_rng(1)
    llm_engine = running.llm.llm_engine
    for num_steps in (0, 1, 3):
        running.add(f"x{num_steps}", Ask(prompt(rng, "3i5"), (1,), max_tokens=50))
        running.add(f"y{num_steps}", Ask(prompt(rng, "9"), (), max_tokens=50))
        for _ in range(num_steps):
            running.step()
        llm_engine.abort_request([f"x{num_steps}", f"y{num_steps}"])
        while llm_engine.has_unfinished_requests():
            running.step()
        running.step()
        running.check_pool_is_whole()


def test_a_request_with_bad_options_ends_with_an_error_and_harms_nobody(running: Engine) -> None:
    rng = np.random.default_rng(2)
    good = Ask(prompt(rng, "3i5"), (1,))
    alone = running.ask([good])[0]
    bad: list[dict[str, Any]] = [{"hidrop": "maybe"}, {"hidrop_keep": [0, 1]}, {"hidrop_kep": [1]}, {"hidrop_keep": 3}]
    answers = running.ask([good, *[Ask(good.tokens, good.images, options) for options in bad], good])
    assert [answer.finish_reason for answer in answers[1:-1]] == ["error"] * len(bad)
    assert answers[0].token_ids == answers[-1].token_ids == alone.token_ids
    running.check_pool_is_whole()


def test_requests_may_keep_other_counts_over_the_same_stages(running: Engine) -> None:
    rng = np.random.default_rng(4)
    tokens = prompt(rng, "3ii5")
    keeps = [0, "all", 0.5, 7, 1]
    own, default = running.ask([Ask(tokens, (1, 2), {"hidrop_keep": keeps}), Ask(tokens, (1, 2))])
    assert [stage["kept"] for stage in own.report["stages"]] == [0, 128, 64, 14, 2]
    assert [stage["kept"] for stage in default.report["stages"]] == [0, 128, 40, 6, 0]
    alone = running.ask([Ask(tokens, (1, 2), {"hidrop_keep": keeps})])[0]
    assert alone.token_ids == own.token_ids


def test_a_prompt_that_ends_with_an_image_runs_dense_and_says_so(running: Engine) -> None:
    answer = running.ask([Ask(prompt(np.random.default_rng(5), "3i"), (1,))])[0]
    assert answer.report["mode"] == "fallback"
    assert "ends with an image" in answer.report["fallback"]
    assert answer.report["kv_blocks"] == answer.report["kv_blocks_dense"]


def test_preempted_requests_resume_with_the_same_tokens(model: Path) -> None:
    rng = np.random.default_rng(6)
    asks = [Ask(prompt(rng, "5i5"), (i,), max_tokens=90) for i in range(4)]
    asks += [Ask(prompt(rng, "5i5"), (i,), {"hidrop": "off"}, max_tokens=90) for i in range(2)]
    asks += [Ask(prompt(rng, "99"), (), max_tokens=90)]
    with engine(model, HIDROP) as roomy:
        expected = [roomy.ask([ask])[0].token_ids for ask in asks]
    with engine(model, HIDROP, num_gpu_blocks_override=90, max_model_len=256, max_num_batched_tokens=1024) as tight:
        preemptions = count_preemptions(tight)
        answers = tight.ask(asks)
        assert preemptions, "the pool was large enough: nothing was tested"
        tight.check_pool_is_whole()
    assert [answer.token_ids for answer in answers] == expected


def count_preemptions(running: Engine) -> list[str]:
    preempted: list[str] = []
    preempt = running.scheduler._preempt_request

    def counting(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    running.scheduler._preempt_request = counting
    return preempted


def test_a_pruned_prompt_is_never_split_from_its_image_on(model: Path) -> None:
    rng = np.random.default_rng(7)
    asks = [Ask(prompt(rng, "9i9"), (i,)) for i in range(6)] + [Ask(prompt(rng, "9" * 20), ())]
    with engine(model, HIDROP, max_model_len=200, max_num_batched_tokens=200) as running:
        chunks = record_chunks(running)
        answers = running.ask(asks)
    assert len(answers) == len(asks)
    vision = [(first, n) for name, first, n in chunks if first <= 10 < first + n and not name.startswith("6")]
    assert len(vision) == 6, chunks
    assert all(first + n == 83 for first, n in vision), "an image prompt was split"


def record_chunks(running: Engine) -> list[tuple[str, int, int]]:
    """(request, first token, tokens) of everything scheduled."""
    chunks: list[tuple[str, int, int]] = []
    schedule = running.scheduler.schedule

    def recording(*args: Any, **kwargs: Any) -> Any:
        before = {key: request.num_computed_tokens for key, request in running.scheduler.requests.items()}
        output = schedule(*args, **kwargs)
        chunks.extend((key, before[key], n) for key, n in output.num_scheduled_tokens.items())
        return output

    running.scheduler.schedule = recording
    return chunks


def cached_keys(running: Engine, name: str, layer: int, num_tokens: int) -> torch.Tensor:
    """[num_tokens, heads, 2 * head size]: what the paged cache of ``layer`` holds of a running request."""
    request = internal_id(running, name)
    for index, group in enumerate(running.scheduler.kv_cache_config.kv_cache_groups):
        names = [n for n in group.layer_names if f".layers.{layer}." in n]
        if names:
            manager = running.scheduler.kv_cache_manager.coordinator.single_type_managers[index]
            blocks = [block.block_id for block in manager.req_to_blocks[request]]
            cache = running.runner.compilation_config.static_forward_context[names[0]].kv_cache
            # [blocks, heads, K then V, slots, head size]
            pages = cache[blocks].view(len(blocks), cache.shape[1], 2, BLOCK, -1)
            return pages.permute(0, 3, 1, 2, 4).flatten(0, 1)[:num_tokens].flatten(2).clone()
    raise AssertionError(f"no layer {layer}")


def test_kv_of_text_only_stages_before_injection_does_not_depend_on_the_image(running: Engine) -> None:
    tokens = prompt(np.random.default_rng(8), "5i6")
    held = {}
    for image in (1, 2):
        name = f"image{image}-"
        running.add(name, Ask(tokens, (image,), max_tokens=9))
        running.step()
        held[image] = {layer: cached_keys(running, name, layer, 12) for layer in range(NUM_LAYERS)}
    for layer in (0, 1):
        assert torch.equal(held[1][layer], held[2][layer])
        assert held[1][layer].abs().sum() > 0
    for layer in range(2, NUM_LAYERS):
        assert not torch.equal(held[1][layer], held[2][layer])
    while running.llm.llm_engine.has_unfinished_requests():
        running.step()


def test_a_request_is_reported_with_its_first_token_and_again_at_its_end(running: Engine) -> None:
    running.add("a", Ask(prompt(np.random.default_rng(9), "5i6"), (1,), max_tokens=40))
    reports = []
    while running.llm.llm_engine.has_unfinished_requests():
        reports += [output.kv_transfer_params for output in running.step()]
    told = [report["hidrop"] for report in reports if report]
    assert len(reports) == 40
    assert [step for step, report in enumerate(reports) if report] == [0, 39]
    assert [stage["rows"] for stage in told[0]["stages"]] == [stage["rows"] for stage in told[1]["stages"]]
    assert told[0]["kv_blocks"] < told[1]["kv_blocks"]


def test_the_worker_forgets_finished_requests(running: Engine) -> None:
    rng = np.random.default_rng(10)
    running.ask([Ask(prompt(rng, "3i5"), (i,)) for i in range(5)])
    running.ask([Ask(prompt(rng, "9"))])
    running.step()
    assert len(running.runner.staged.records) <= 1, "plans of finished requests stay in the worker"


def test_one_request_may_inject_where_another_cuts(running: Engine) -> None:
    rng = np.random.default_rng(11)
    wishes: list[dict[str, Any]] = [
        {},
        {"hidrop_keep": ["all", 30, 10, 3, 0]},
        {"hidrop_keep": ["all", "all", 5, 0, 0]},
        {"hidrop_keep": [20, 20, 20, 2, 1]},
        {"hidrop_keep": [0, 0, "all", 9, 9]},
        {"hidrop": "off"},
        {},
    ]
    asks = [Ask(prompt(rng, "3ii5"), (2 * i, 2 * i + 1), wish, max_tokens=8) for i, wish in enumerate(wishes)]
    alone = [running.ask([ask])[0] for ask in asks]
    together = running.ask(asks)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=1e-4)
    kept = [[stage["kept"] for stage in answer.report["stages"]] for answer in together]
    assert kept[1] == [128, 60, 20, 6, 0]
    assert kept[4] == [0, 0, 128, 18, 18]
