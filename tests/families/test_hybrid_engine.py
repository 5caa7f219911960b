"""Qwen3.5 in the engine: blocks and states, batches, preemption, and the choices that its layers refuse."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.utils import AttentionGroup

from tests.engine.harness import Ask, Engine, engine
from tests.families.checkpoints import CHECKPOINTS, form, qwen
from tests.families.test_hybrid import CHOICES, HIDROP, MUSTDROP, SETTINGS, VISIPRUNER, deviation
from vllm_hidrop.engine.kv_cache import StageManager
from vllm_hidrop.plan.costs import RequestCosts, request_costs
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.planner import Planner
from vllm_hidrop.plan.shapes import text_shape
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.verify import tiny_qwen

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks have 96 tokens: a state 136 KB, a token's keys and values in one layer 2 KB."""
    rope = tiny_qwen.rope([6, 5, 5], mrope_interleaved=True, partial_rotary_factor=0.25)
    changed = {"num_key_value_heads": 4, "head_dim": 128, "linear_num_value_heads": 2, "rope_parameters": rope}
    text = qwen.hybrid_text() | changed
    config = Qwen3_5Config(text_config=text, vision_config=tiny_qwen.qwen3_vision(), **tiny_qwen.token_ids())
    directory = tmp_path_factory.mktemp("wide")
    form.save(directory, Qwen3_5ForConditionalGeneration, config, qwen.hybrid_processor(), "bfloat16")
    return directory


def asked(layout: str, seed: int, max_tokens: int) -> Ask:
    """Every image has 64 tokens."""
    tokens, images = CHECKPOINTS["qwen3_5"].prompt(layout, seed), layout.count("i")
    sizes = ((128, 128),) * images
    return Ask(tuple(tokens), tuple(range(10 * seed, 10 * seed + images)), {}, max_tokens, sizes)


def blocks_held(running: Engine, request_id: str) -> tuple[dict[int, int], int]:
    """By stage, the blocks of its layers with attention; and the states."""
    of_stage: dict[int, int] = {}
    num_states = 0
    for manager in running.scheduler.kv_cache_manager.coordinator.single_type_managers:
        held = len(manager.req_to_blocks.get(request_id, ()))
        if isinstance(manager, StageManager):
            stage = manager.kv_cache_spec.stage
            of_stage[stage] = of_stage.get(stage, 0) + held
        else:
            num_states += held
    return of_stage, num_states


def planned_costs(running: Engine, num_text: int, num_vision: int) -> RequestCosts:
    """By arithmetic, of a prompt with one image."""
    planner = running.scheduler.planner
    shape = text_shape(running.scheduler.vllm_config.model_config.hf_config.get_text_config())
    plan = planner.plan(num_text + num_vision, [Span(0, num_vision)], None)
    return request_costs(shape, planner.schedule, plan, Signal.NEXT_ATTENTION, planner.block_size)


def test_blocks_are_the_plans_and_a_state_is_one_block(wide: Path) -> None:
    with engine(wide, CHOICES["hidrop"], **SETTINGS) as running:
        size = running.scheduler.planner.block_size
        assert size == 96
        running.add("a", asked("4iii5", 1, 40))
        running.add("b", asked("9", 2, 3))
        num_text, num_vision = 1 + 4 + 5 + 6, 192
        costs = planned_costs(running, num_text, num_vision)
        reports = []
        for step in range(40):
            ended = [output for output in running.step() if output.finished]
            reports += [(output.kv_transfer_params or {})["hidrop"] for output in ended]
            request_id = next((key for key in running.scheduler.requests if key.startswith("a")), None)
            if request_id is None:
                break
            # Layers 3, 7 and 11 attend, in stages 2 to 4; 0 and 1 are recurrent alone.
            tokens = {2: num_text + step + num_vision // 2, 3: num_text + step + num_vision // 4, 4: num_text + step}
            expected = {stage: -(-n // size) for stage, n in tokens.items()}
            assert blocks_held(running, request_id) == (expected, 9), f"step {step}"
            assert step or expected == {i: stage.kv_blocks for i, stage in enumerate(costs.stages) if i >= 2}
            assert running.scheduler.check_integrity() == []
        assert costs.stages[0].kv_bytes == costs.stages[1].kv_bytes == 0
        text, pruned = reports
        page = running.scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
        for report, blocks in ((text, [0, 0, 1, 1, 1]), (pruned, [0, 0, 2, 2, 1])):
            assert [stage["kv_blocks"] for stage in report["stages"]] == blocks
            assert report["kv_bytes"] == sum(blocks) * page
            assert report["state_bytes"] == 9 * page
        assert pruned["kv_blocks_dense"] == 3 * 3
        assert pruned["kv_bytes_dense"] == 9 * page


def test_metadata_is_built_once_for_all_recurrent_layers_that_run_alike(wide: Path) -> None:
    with engine(wide, CHOICES["hidrop"], **SETTINGS) as running:
        running.add("a", asked("4i5", 1, 5))
        running.add("b", asked("2ii5", 2, 5))
        counts = []
        for _ in range(3):
            with patch.object(
                AttentionGroup, "build_metadata", autospec=True, side_effect=AttentionGroup.build_metadata
            ) as build:
                running.step()
            names = [call.args[0].backend.get_name() for call in build.call_args_list]
            counts.append((names.count("GDN_ATTN"), names.count("CPU_ATTN")))
        # Two layers 3, 7 and 11 with other rows or lengths each; five stages of recurrent layers, then one set of rows.
        assert counts == [(4, 3), (1, 3), (1, 3)]
        while running.scheduler.requests:
            running.step()


def test_text_before_the_first_image_may_run_in_earlier_steps(wide: Path) -> None:
    """The second prompt begins with the rows that the first one leaves it; its states go on from there."""
    asks = [asked("9i4", 2, 6), asked("9" * 12 + "i5", 1, 6)]
    with engine(wide, CHOICES["fastv"], **SETTINGS) as running:
        whole = running.ask(asks)
    with engine(wide, CHOICES["fastv"], **SETTINGS, max_num_batched_tokens=128) as running:
        steps: list[dict[str, int]] = []
        schedule = running.scheduler.schedule

        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            steps.append(output.num_scheduled_tokens)
            return output

        with patch.object(running.scheduler, "schedule", recorded):
            chunked = running.ask(asks)
    prefills = [[num for num in step.values() if num > 1] for step in steps]
    assert list(map(len, prefills[:2])) == [2, 1], prefills
    assert not any(prefills[2:])
    for ours, theirs in zip(chunked, whole, strict=True):
        assert ours.report["mode"] == "pruned"
        assert deviation(ours.logits[:1], theirs.logits[:1]) < 0.15


def test_two_requests_in_one_batch_answer_as_each_alone(wide: Path) -> None:
    asks = [asked("4i5", 1, 8), asked("2ii4", 2, 8)]
    with engine(wide, CHOICES["fastv"], **SETTINGS) as running:
        alone = [running.ask([each])[0] for each in asks]
        together = running.ask(asks)
    assert all(deviation(a.logits, b.logits) < 0.05 for a, b in zip(together, alone, strict=True))
    assert deviation(alone[0].logits, alone[1].logits) > 0.5


def test_preempted_and_aborted_requests_give_every_block_back(wide: Path) -> None:
    asks = [asked("4iii5", 1, 100), asked("6iii4", 2, 100)]
    with engine(wide, CHOICES["hidrop"], **SETTINGS, max_model_len=384, num_gpu_blocks_override=29) as running:
        alone = [running.ask([each])[0] for each in asks]
        with patch.object(running.scheduler, "_preempt_request", wraps=running.scheduler._preempt_request) as preempt:
            together = running.ask(asks)
        assert preempt.call_count
        for ours, theirs in zip(together, alone, strict=True):
            # Behind a preemption many tokens are computed at once, which rounds otherwise; one day another token wins.
            alike = [a == b for a, b in zip(ours.token_ids, theirs.token_ids, strict=True)]
            num_alike = alike.index(False) if False in alike else len(alike)
            assert num_alike >= 80
            assert deviation(ours.logits[: num_alike + 1], theirs.logits[: num_alike + 1]) < 0.1
        running.check_pool_is_whole()
        for index, each in enumerate(asks):
            running.add(f"gone{index}", each)
        for _ in range(5):
            running.step()
        running.llm.llm_engine.abort_request(["gone0", "gone1"])
        running.step()


# What is refused, and what is moved.


def configured(model: Path, hidrop: dict[str, Any], **settings: Any) -> Any:
    overrides = {"architectures": ["HidropQwen3_5ForConditionalGeneration"]}
    arguments = {"hf_overrides": overrides, "additional_config": {"hidrop": hidrop}, "enforce_eager": True}
    return EngineArgs(model=str(model), **(arguments | settings)).create_engine_config()


@pytest.mark.parametrize(
    ("hidrop", "message"),
    [
        ({"method": "fastv", "options": {"layer": 2}}, r"cut at layer 2 is scored under layer 1.*cuts: layers 4, 8"),
        (
            {"method": "hidrop", "options": {"scale": True}},
            r"cut at layer 4 is scored under layer 4, which has no attention.*cuts: layers 3, 7, 11",
        ),
        ({"method": "pyramiddrop", "options": {"cuts": [0.25, 0.5, 0.75]}}, r"cut at layer 6 .* layers 3, 7, 11"),
        ({"method": "mustdrop", "options": MUSTDROP | {"filter_layers": [3, 5]}}, r"cut at layer 6.*: layers 4, 8"),
        ({"method": "visipruner", "options": VISIPRUNER | {"test_every": 1}}, r"cut at layer 5 .*: layers 4, 8"),
        (
            {"method": "visipruner", "options": VISIPRUNER | {"parts": ["shallow", "middle", "deep"]}},
            r"edits the attention of layers 0, 1, which have none in this model; usable: layers 3, 7, 11",
        ),
        ({"method": "hidrop", "options": HIDROP, "positions": "compacted"}, "need decoder layers of the standard form"),
    ],
)
def test_a_cut_that_cannot_be_scored_is_refused_with_the_layers_that_can(
    wide: Path, hidrop: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configured(wide, hidrop)


@pytest.mark.parametrize(
    ("method", "layers", "options"),
    [("fastv", [0, 4], {"layer": 4}), ("pyramiddrop", [0, 3, 7, 11], {"cuts": (3 / 12, 7 / 12, 11 / 12)})],
)
def test_published_cuts_move_to_layers_with_attention_and_it_is_said(
    wide: Path, monkeypatch: pytest.MonkeyPatch, method: str, layers: list[int], options: dict[str, Any]
) -> None:
    told: list[str] = []
    monkeypatch.setattr("vllm_hidrop.engine.configure.logger.info", lambda text, *args: told.append(text % args))
    config = configured(wide, {"method": method}, enable_prefix_caching=True)
    planner = Planner.from_vllm_config(config)
    assert [stage.first_layer for stage in planner.schedule.stages] == layers
    assert config.additional_config["hidrop"]["resolved"]["options"] == options
    assert any(f"moved to {next(iter(options))}" in line for line in told)
    assert any("Prefix caching and the reuse of images are off" in line for line in told)
    assert config.cache_config.enable_prefix_caching is False


def test_a_server_that_never_prunes_caches_as_stock_does(wide: Path) -> None:
    assert configured(wide, {"method": "none"}, enable_prefix_caching=True).cache_config.enable_prefix_caching


def test_requests_cannot_choose_tokens_where_nothing_scores_them(wide: Path) -> None:
    """Methods that cannot are no alternatives; those that can may keep 0 or all anywhere."""
    planner = Planner.from_vllm_config(configured(wide, CHOICES["hidrop"]))
    assert "fastv" not in planner.methods
    spans = [Span(4, 64)]
    assert planner.plan(80, spans, {"hidrop_keep": [0, 0, "all", 8, 0]}).is_pruned
    for keeps, stage, layer in (([0, "all", 32, 16, 8], 4, 9), ([32, 32, 16, 16, 0], 0, 0)):
        message = f"on entry to stage {stage} under layer {layer}, which has no attention .* choose: 2, 3$"
        with pytest.raises(ValueError, match=message):
            planner.plan(80, spans, {"hidrop_keep": keeps})
