"""Renumbered positions on the real engine, against the independent reference of the released programs.

Equal are the survivors of every layer, logits and greedy tokens. The ids are ours, their differences the programs'.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CompilationMode

from tests.engine.harness import Answer, Ask, Engine, engine, prompt
from tests.engine.test_adaptive_parity import (
    LAYOUTS,
    VISIPRUNER,
    check_margins,
    full_tokens,
    mustdrop_options,
    visipruner_options,
)
from tests.engine.test_blocks import count_preemptions
from tests.engine.test_image_prefix import check_states, conversation, end_of_images
from tests.engine.test_oracle_parity import OWN, SHAPE, pixel_values, rule_of
from tests.engine.test_prefix import reused
from tests.engine.test_start import configure
from tests.oracles.renumbered import RenumberedOracle
from tests.oracles.visipruner import RenumberedVisiPrunerOracle
from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.verify.reference.mustdrop_settings import MustDropSettings
from vllm_hidrop.verify.reference.stages import OracleStage
from vllm_hidrop.verify.reference.visipruner import VisiPrunerSettings
from vllm_hidrop.verify.tiny_models import NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

NUM_GENERATED = 9
RENUMBERED = {"positions": "renumbered"}
PYRAMID = {"method": "pyramiddrop", "options": {"cuts": [0.25, 0.5], "keeps": [30, 3]}}
LATE = OWN | {"inject_layer": 3, "filter_layers": [4, 6], "keeps": [20, 5], "exit_layer": 8}
FIXED: list[tuple[str, dict[str, Any]]] = [
    ("llama-clip", {"method": "pyramiddrop"}),
    ("mistral-clip", {"method": "pyramiddrop"}),
    ("qwen2-siglip", PYRAMID),
    ("mistral-clip", {"method": "pyramiddrop", "options": {"cuts": [0.125, 0.25, 0.5], "keeps": [0.9, 0.2, 0.02]}}),
    ("qwen2-siglip", {"method": "fastv", "options": {"layer": 3, "keep": 7}}),
    ("llama-clip", {"method": "fastv", "options": {"layer": 2, "keep": 0.25, "exit_layer": 6}}),
    ("mistral-clip", {"method": "random", "options": {"layer": 0, "keep": 9}}),
    ("llama-clip", {"method": "uniform", "options": {"layer": 4, "keep": 11}}),
    ("mistral-clip", {"method": "hidrop", "options": LATE}),
    ("qwen2-siglip", {"method": "hidrop", "options": LATE | {"filter_layers": [], "keeps": []}}),
]
MUSTDROP = [
    ("llama-clip", MustDropSettings(0.014, 0.03, (1, 3, 5), 0.2, 2)),
    ("mistral-clip", MustDropSettings(0.014, 0.05, (0, 2), 0.3, 4, key_layer="feature")),
    ("qwen2-clip", MustDropSettings(0.016, 0.06, (1, 4, 6), 0.0, 2, key_rate=0.3)),
    ("llama-clip", MustDropSettings(0.02, 0.1, (2, 4), 0.15, 2, cut_cache=False)),
    ("qwen2-siglip", MustDropSettings(0.015, 0.05, (1, 3), None, key_rate=0.0)),
]
ADAPTIVE: dict[str, list[tuple[int, str, Any]]] = {
    "mustdrop": [(i, *case) for i, case in enumerate(MUSTDROP)],
    "visipruner": [(i, *VISIPRUNER[i]) for i in (0, 2, 4, 6, 8, 9)],
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    def made(name: str, seed: int) -> Path:
        text, tower = name.split("-")
        return make_llava(tmp_path_factory.mktemp(name), text, tower, seed)

    return made


def asks(seed: int = 3, **options: Any) -> list[Ask]:
    rng = np.random.default_rng(seed)
    return [
        Ask(prompt(rng, layout), tuple(range(10 * i, 10 * i + images)), options, NUM_GENERATED)
        for i, (layout, images) in enumerate(LAYOUTS.items())
    ]


def staged(model: Path, choice: dict[str, Any], ask: Ask, **settings: Any) -> Any:
    """The reference's result under a method of fixed counts."""
    schedule = resolve(HidropConfig.parse(choice), SHAPE).schedule
    kept = schedule.kept(TOKENS_PER_IMAGE)
    if ask.options.get("hidrop") == "off":
        kept = (TOKENS_PER_IMAGE,) * len(kept)
    stages = [
        OracleStage(stage.first_layer, (keep,) * len(ask.images))
        for stage, keep in zip(schedule.stages, kept, strict=True)
    ]
    seed = choice.get("options", {}).get("seed", 0)
    oracle = RenumberedOracle(model)
    return oracle.generate(
        full_tokens(ask), pixel_values(ask), stages, rule_of(choice), ask.max_tokens, seed=seed, **settings
    )


def check(running: Engine, asked: list[Ask], answers: list[Answer], expected: list[Any]) -> None:
    schedule = running.scheduler.planner.schedule
    for ask, answer, result in zip(asked, answers, expected, strict=True):
        torch.testing.assert_close(answer.logits, result.logits, atol=1e-4, rtol=1e-4)
        assert answer.token_ids == result.token_ids
        if ask.images and "hidrop_explain" in ask.options:
            stages = answer.report["stages"]
            found = [stages[schedule.stage_of_layer(layer)]["patches"] for layer in range(NUM_LAYERS)]
            assert found == [[sorted(patches) for patches in layer] for layer in result.kept]


def check_alone_and_together(
    running: Engine, asked: list[Ask], expected: list[Any], off: list[Ask], expected_off: list[Any]
) -> None:
    for ask, result in zip(asked, expected, strict=True):
        check(running, [ask], running.ask([ask]), [result])
    mixed = [each for pair in zip(asked, off, strict=True) for each in pair]
    check(
        running, mixed, running.ask(mixed), [each for pair in zip(expected, expected_off, strict=True) for each in pair]
    )


@pytest.mark.parametrize(("number", "name", "choice"), [(i, *case) for i, case in enumerate(FIXED)])
def test_methods_of_fixed_counts_equal_the_reference(
    make: Callable[[str, int], Path], number: int, name: str, choice: dict[str, Any]
) -> None:
    model, choice = make(name, number), choice | RENUMBERED
    asked, off = asks(number, hidrop_explain=True), asks(number, hidrop="off")
    expected, expected_off = ([staged(model, choice, ask) for ask in each] for each in (asked, off))
    nearest = min(result.margins["cut"] for result in expected)
    print(f"nearest to another cut: {nearest:.1e}")
    assert nearest > 1e-7
    with engine(model, choice) as running:
        check_alone_and_together(running, asked, expected, off, expected_off)
    # Were the scheme ignored, the engine would not have passed.
    for ask, result in zip(asked, expected, strict=True):
        persistent = staged(model, choice, ask, positions="persistent")
        assert torch.allclose(result.logits[-1], persistent.logits[-1], atol=1e-2) == (not ask.images)


@pytest.mark.parametrize(("number", "name", "settings"), ADAPTIVE["mustdrop"])
def test_mustdrop_equals_the_reference(
    make: Callable[[str, int], Path], number: int, name: str, settings: MustDropSettings
) -> None:
    """Merged tokens first, in falling similarity; generated tokens numbered by what each layer's cache holds."""
    model = make(name, 100 + number)
    oracle = RenumberedOracle(model)
    choice = {"method": "mustdrop", "preset": "tok64", "options": mustdrop_options(settings)} | RENUMBERED
    asked, off = asks(number, hidrop_explain=True), asks(number, hidrop="off")

    def reference(ask: Ask, **changes: Any) -> Any:
        return oracle.generate_mustdrop(full_tokens(ask), pixel_values(ask), settings, ask.max_tokens, **changes)

    expected = [reference(ask) for ask in asked]
    check_margins(expected)
    with engine(model, choice) as running:
        check_alone_and_together(running, asked, expected, off, [staged(model, PYRAMID, ask) for ask in off])
    with_images = [(ask, result) for ask, result in zip(asked, expected, strict=True) if ask.images]
    for change, matters in (
        ({"order": "raster"}, settings.merge_threshold is not None),
        ({"decode_ids": "after_prompt"}, settings.cut_cache),
    ):
        others = [reference(ask, **change).logits for ask, _ in with_images]
        same = [torch.allclose(a, b.logits, atol=1e-3) for a, (_, b) in zip(others, with_images, strict=True)]
        assert all(same) != matters


@pytest.mark.parametrize(("number", "name", "settings"), ADAPTIVE["visipruner"])
def test_visipruner_equals_its_masked_reference(
    make: Callable[[str, int], Path], number: int, name: str, settings: VisiPrunerSettings
) -> None:
    """No released program does so; a layer's rows are numbered as the others' are."""
    model = make(name, number)
    oracle = RenumberedVisiPrunerOracle(model)
    choice = {"method": "visipruner", "options": visipruner_options(settings)} | RENUMBERED
    asked, off = asks(number, hidrop_explain=True), asks(number, hidrop="off")
    expected = [oracle.generate(full_tokens(ask), pixel_values(ask), settings, ask.max_tokens) for ask in asked]
    check_margins(expected)
    with engine(model, choice) as running:
        check_alone_and_together(running, asked, expected, off, [staged(model, PYRAMID, ask) for ask in off])


def test_requests_with_their_own_keeps_inject_cut_and_leave_in_one_stage(make: Callable[[str, int], Path]) -> None:
    model = make("mistral-clip", 1)
    choice = {"method": "hidrop", "options": LATE | {"exit_layer": None}} | RENUMBERED
    keeps: list[list[Any]] = [
        [0, "all", 20, 5],
        [0, 0, "all", 7],
        ["all", 30, 12, 0],
        [0, 0, 0, "all"],
        ["all"] * 4,
        [0] * 4,
    ]
    firsts = [0, 2, 4, 6]
    asked = [
        replace(ask, options={"hidrop_keep": keep, "hidrop_explain": True})
        for keep in keeps
        for ask in asks(4)
        if ask.images
    ]
    oracle = RenumberedOracle(model)
    expected = []
    for ask in asked:
        kept = [TOKENS_PER_IMAGE if keep == "all" else keep for keep in ask.options["hidrop_keep"]]
        stages = [OracleStage(first, (keep,) * len(ask.images)) for first, keep in zip(firsts, kept, strict=True)]
        tokens = full_tokens(ask)
        expected.append(oracle.generate(tokens, pixel_values(ask), stages, "attention_next", ask.max_tokens))
    with engine(model, choice) as running:
        assert [stage.first_layer for stage in running.scheduler.planner.schedule.stages] == firsts
        check(running, asked, running.ask(asked), expected)


@pytest.mark.parametrize("name", ["pyramiddrop", "late injection"])
def test_a_reused_image_changes_nothing(make: Callable[[str, int], Path], name: str) -> None:
    """Before the first cut all ids are the prompt's; those before an injection depend on the images to come."""
    model = make("mistral-clip", 2)
    is_late = name != "pyramiddrop"
    choice = ({"method": "hidrop", "options": LATE} if is_late else PYRAMID) | RENUMBERED
    rng = np.random.default_rng(1)
    turns = conversation(rng, "9")[:6] + conversation(rng, "99999999")
    added = (5, 11)  # turns with an image that no turn before had behind the same start
    expected = [staged(model, choice, ask) for ask, _ in turns]
    with engine(model, choice) as running:
        for number, ((ask, num_images), result) in enumerate(zip(turns, expected, strict=True)):
            answer = running.ask([ask])[0]
            check(running, [ask], [answer], [result])
            is_reused = num_images and not (is_late and number in added)
            assert reused(answer) == (end_of_images(ask.tokens, num_images) if is_reused else 0)
        answers = running.ask([ask for ask, _ in turns])
        check(running, [ask for ask, _ in turns], answers, expected)
        assert all(
            reused(answer) == end_of_images(ask.tokens, len(ask.images))
            for (ask, _), answer in zip(turns, answers, strict=True)
        )
        check_states(running)


@pytest.mark.parametrize("name", ["pyramiddrop", "mustdrop"])
def test_preempted_requests_go_on_as_they_were(make: Callable[[str, int], Path], name: str) -> None:
    model = make("llama-clip", 100)
    settings = MUSTDROP[0][1]
    own = {"method": "mustdrop", "preset": "tok64", "options": mustdrop_options(settings)}
    choice = (own if name == "mustdrop" else PYRAMID) | RENUMBERED
    rng = np.random.default_rng(6)
    asked = [Ask(prompt(rng, "5i5"), (i,), max_tokens=60) for i in range(5)]
    asked.append(Ask(prompt(rng, "5i5"), (1,), {"hidrop": "off"}, max_tokens=60))
    oracle = RenumberedOracle(model)
    expected = [
        oracle.generate_mustdrop(full_tokens(ask), pixel_values(ask), settings, ask.max_tokens)
        if name == "mustdrop" and not ask.options
        else staged(model, PYRAMID, ask)
        for ask in asked
    ]
    small = {"num_gpu_blocks_override": 80, "max_model_len": 256, "max_num_batched_tokens": 1024}
    with engine(model, choice, **small) as running:
        preempted = count_preemptions(running)
        check(running, asked, running.ask(asked), expected)
    assert preempted, "the pool was large enough: nothing was tested"


def test_the_compiled_engine_decodes_renumbered_requests(make: Callable[[str, int], Path]) -> None:
    """Generated tokens have the ids of the full sequence, so vLLM's own compiled forward runs them as it is."""
    model = make("llama-clip", 100)
    settings = MUSTDROP[0][1]
    choice = {"method": "mustdrop", "preset": "tok64", "options": mustdrop_options(settings)} | RENUMBERED
    oracle, asked = RenumberedOracle(model), asks(0)
    expected = [
        oracle.generate_mustdrop(full_tokens(ask), pixel_values(ask), settings, ask.max_tokens) for ask in asked
    ]
    with engine(model, choice, enforce_eager=False) as running:
        assert running.llm.llm_engine.vllm_config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
        check(running, asked, running.ask(asked), expected)


def test_a_checkpoints_scheme_is_served_and_others_are_refused(make: Callable[[str, int], Path]) -> None:
    model = make("mistral-clip", 1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidrop": PYRAMID | RENUMBERED}))
    resolved = configure(model, {}).additional_config["hidrop"]["resolved"]
    assert (resolved["method"], resolved["positions"]) == ("pyramiddrop", "renumbered")
    with pytest.raises(ValueError, match=r'trained with renumbered positions, not persistent; .*"force": true'):
        configure(model, {"positions": "persistent"})
    (model / "config.json").write_text(json.dumps(config | {"hidrop": PYRAMID}))
    with pytest.raises(ValueError, match=r'trained with persistent positions, not renumbered; .*"force": true'):
        configure(model, RENUMBERED)


def test_a_start_without_positions_tells_how_pyramiddrops_authors_train(
    make: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama-clip", 1)
    told: list[str] = []
    monkeypatch.setattr("vllm_hidrop.engine.configure.logger.warning", lambda text, *args: told.append(text % args))
    configure(model, PYRAMID | {"positions": "persistent"})
    configure(model, PYRAMID | RENUMBERED)
    configure(model, {"method": "fastv"})
    assert not told
    configure(model, PYRAMID)
    assert told == [
        "Serving pyramiddrop with persistent positions. "
        'A checkpoint that its authors\' program trained needs {"positions": "renumbered"}.'
    ]


def test_an_fp8_cache_that_is_cut_is_refused_and_one_that_is_not_is_served(make: Callable[[str, int], Path]) -> None:
    model = make("llama-clip", 1)
    options = mustdrop_options(MUSTDROP[0][1])
    cut = {"method": "mustdrop", "preset": "tok64", "options": options} | RENUMBERED
    settings: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    with pytest.raises(ValueError, match=r"renumbered positions where a method cuts its cache: .*fp8"):
        configure(model, cut, **settings)
    for allowed in (
        cut | {"options": options | {"cut_cache": False}},
        cut | {"positions": "persistent"},
        PYRAMID | RENUMBERED,
    ):
        assert configure(model, allowed, **settings)
