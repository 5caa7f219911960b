"""Costs on paper: blocks by vLLM's grouping rule, FLOPs by the formulas, both against dense."""

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hidrop.methods import METHODS, Method, ModelShape
from vllm_hidrop.methods.fastv import FastV
from vllm_hidrop.methods.hidrop import HiDrop
from vllm_hidrop.methods.none import NoPruning
from vllm_hidrop.methods.pyramiddrop import PyramidDrop
from vllm_hidrop.plan.costs import (
    RequestCosts,
    encoder_flops,
    flops_run,
    group_size,
    ideal_decode_ratio,
    num_groups,
    request_costs,
)
from vllm_hidrop.plan.paper_flops import paper_vision_flops
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import make_plan
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.plan.shapes import LLAVA_7B, LLAVA_13B, Recurrence, TextShape
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.plan.vision import LLAVA_7B_VISION

settings.load_profile("ci")  # no deadline on a shared machine, the same examples every time

PAPER = ModelShape(num_layers=32, tokens_per_image=576)
TINY = TextShape(
    num_layers=4, hidden_size=3, intermediate_size=5, num_heads=4, num_kv_heads=2, head_size=7, vocab_size=11
)


def costs_of(
    method: Method, images: tuple[int, ...] = (576,), text: int = 64, block_size: int = 32, shape: TextShape = LLAVA_7B
) -> RequestCosts:
    schedule = method.schedule(ModelShape(shape.num_layers, 576))
    spans = [Span(sum(images[:index]), length) for index, length in enumerate(images)]
    plan = make_plan(schedule, sum(images) + text, spans)
    return request_costs(shape, schedule, plan, method.signal, block_size)


def vision_tokens_per_layer(method: Method) -> list[int]:
    schedule = method.schedule(PAPER)
    kept = schedule.kept(576)
    return [kept[schedule.stage_of_layer(layer)] for layer in range(32)]


@pytest.mark.parametrize(
    ("method", "tera_flops"),
    [
        (NoPruning(), 3.817),
        (PyramidDrop(), 1.777),
        (HiDrop.from_preset("tok48"), 0.317),
        (HiDrop.from_preset("tok64"), 0.421),
        (HiDrop.from_preset("tok80"), 0.529),
    ],
)
def test_the_papers_formula_gives_the_papers_numbers(method: Method, tera_flops: float) -> None:
    flops = paper_vision_flops(vision_tokens_per_layer(method), 4096, 11008)
    assert flops / 1e12 == pytest.approx(tera_flops, abs=0.0005)


def slow_layer_flops(shape: TextShape, rows: int) -> int:
    """Every matrix product of a layer on its own, and every causal pair of rows."""
    query, key = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    matrices = [
        (hidden, query),
        (hidden, key),
        (hidden, key),
        (query, hidden),
        (hidden, mlp),
        (hidden, mlp),
        (mlp, hidden),
    ]
    products = sum(2 * rows * into * out for into, out in matrices)
    pairs = sum(1 for row in range(rows) for column in range(rows) if column <= row)
    return products + pairs * shape.num_heads * 2 * (2 * shape.head_size)


@pytest.mark.parametrize("rows", [0, 1, 2, 17])
def test_a_layers_flops_are_the_sum_of_its_products(rows: int) -> None:
    assert TINY.layer_flops(rows, 0) == slow_layer_flops(TINY, rows)


def test_a_dense_7b_prefill_is_two_flops_per_weight_and_row_plus_attention() -> None:
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    dense = costs_of(NoPruning()).dense_flops
    attention = 32 * 2 * 4096 * 640 * 641
    assert dense == 2 * weights * 640 + attention + 2 * 4096 * 32064


@pytest.mark.parametrize(
    ("first_layers", "num_layers", "size", "groups"),
    [
        ([0], 32, 32, [1]),
        ([0, 8, 10, 14, 16, 18, 24], 32, 2, [4, 1, 2, 1, 1, 3, 4]),
        ([0, 8, 16, 24], 32, 8, [1, 1, 1, 1]),
        ([0, 2], 32, 2, [1, 15]),
        ([0, 3, 8], 12, 3, [1, 2, 2]),  # 3, 5 and 4 layers: 5 is not under 1.5 * 3
        ([0, 12], 25, 13, [1, 1]),  # 12 and 13 layers: 13 is, so the stage of 12 is padded by one layer
        ([0, 2], 5, 2, [1, 2]),  # 3 is not under 1.5 * 2
    ],
)
def test_groups_follow_vllms_rule(first_layers: list[int], num_layers: int, size: int, groups: list[int]) -> None:
    schedule = Schedule.of(dict.fromkeys(first_layers, "all"), num_layers)
    assert group_size(schedule) == size
    assert [num_groups(schedule, stage) for stage in range(len(first_layers))] == groups


def test_hidrop_tok64_holds_the_blocks_counted_by_hand() -> None:
    found = costs_of(HiDrop())
    # Rows 64, 640, 279, 74, 69, 65, 64 take 2, 20, 9, 3, 3, 3, 2 blocks of 32 in each group.
    assert [stage.rows for stage in found.stages] == [64, 640, 279, 74, 69, 65, 64]
    assert [stage.kv_blocks for stage in found.stages] == [8, 20, 18, 3, 3, 9, 8]
    assert [stage.layer_blocks for stage in found.stages] == [16, 40, 36, 6, 6, 18, 16]
    assert found.vision_token_layers == 2048
    assert found.row_layers == 2048 + 32 * 64
    assert found.dense_kv_blocks == 16 * 20
    block_bytes = 32 * 2 * 2 * 32 * 128 * 2  # tokens, layers, K and V, heads, head size, bfloat16
    assert found.kv_bytes == 69 * block_bytes
    assert found.dense_kv_bytes == 16 * 20 * block_bytes


def test_padding_layers_cost_bytes_that_stock_vllm_does_not_hold() -> None:
    found = costs_of(FastV(layer=12, keep=1.0), shape=dataclasses.replace(LLAVA_7B, num_layers=25))
    assert found.group_size == 13
    assert found.kv_bytes * 25 == found.dense_kv_bytes * 26


def test_scoring_under_the_next_layer_projects_the_rows_before_the_cut() -> None:
    schedule = Schedule.of({0: "all", 2: 3}, 4)
    plan = make_plan(schedule, 14, [Span(0, 10)])
    flops = {
        signal: request_costs(TINY, schedule, plan, signal, 16).stages[1].flops - TINY.layers_flops(7, [2, 3])
        for signal in Signal
    }
    query_row = 2 * 4 * 7 * 14
    projections = 2 * 3 * (4 + 2 * 2) * 7 * (14 - 7)
    assert flops[Signal.NONE] == 0
    assert flops[Signal.PREVIOUS_ATTENTION] == query_row
    assert flops[Signal.NEXT_ATTENTION] == query_row + projections


def test_injection_exit_and_unchanged_keeps_score_nothing() -> None:
    schedule = Schedule.of({0: 0, 1: "all", 2: 10, 3: 0}, 4)
    plan = make_plan(schedule, 14, [Span(0, 10)])
    found = request_costs(TINY, schedule, plan, Signal.NEXT_ATTENTION, 16)
    assert [stage.flops for stage in found.stages] == [TINY.layer_flops(rows, 0) for rows in (4, 14, 14, 4)]


@pytest.mark.parametrize("name", METHODS)
@given(
    images=st.lists(st.integers(1, 900), max_size=3).map(tuple),
    text=st.integers(1, 300),
    block_size=st.sampled_from([1, 16, 32, 128]),
)
def test_costs_stay_between_text_alone_and_dense(
    name: str, images: tuple[int, ...], text: int, block_size: int
) -> None:
    found = costs_of(METHODS[name](), images, text, block_size)
    for stage in found.stages:
        assert stage.rows == text + stage.vision_tokens <= stage.dense_rows
        assert stage.layer_blocks <= stage.dense_layer_blocks
        assert stage.kv_blocks <= stage.dense_kv_blocks
        # One group holds at least its layers, so padding only ever adds.
        assert stage.kv_bytes >= stage.layer_blocks * block_size * LLAVA_7B.kv_bytes_per_row
        assert stage.flops >= stage.num_layers * LLAVA_7B.layer_flops(text, 0)
    if not images or name == "none":
        assert found.flops == found.dense_flops
        assert found.ideal_speedup == 1


@given(block_size=st.integers(1, 512), text=st.integers(1, 2_000))
def test_a_text_request_costs_what_it_costs_dense(block_size: int, text: int) -> None:
    found = costs_of(HiDrop(), (), text, block_size)
    assert (found.kv_blocks, found.kv_bytes) == (found.dense_kv_blocks, found.dense_kv_bytes)


def test_the_vision_tower_bounds_the_ideal_speedup() -> None:
    schedule = HiDrop().schedule(PAPER)
    plan = make_plan(schedule, 2 * 576 + 64, [Span(0, 576, 0), Span(576, 576, 1)])
    found = request_costs(LLAVA_7B, schedule, plan, Signal.NEXT_ATTENTION, 32, LLAVA_7B_VISION)
    assert found.encoder_flops == 2 * LLAVA_7B_VISION.flops([576])
    assert found.ideal_speedup_with_encoder is not None
    assert 1 < found.ideal_speedup_with_encoder < found.ideal_speedup
    exact = Fraction(found.dense_flops + found.encoder_flops, found.flops + found.encoder_flops)
    assert found.ideal_speedup_with_encoder == pytest.approx(float(exact))
    assert costs_of(HiDrop()).ideal_speedup_with_encoder is None


def test_the_vision_towers_flops_are_the_sum_of_its_parts() -> None:
    patches = 2 * 576 * (3 * 14 * 14) * 1024
    layer = 577 * 2 * (4 * 1024 * 1024 + 2 * 1024 * 4096) + 2 * 2 * 577 * 577 * 1024
    projector = 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert LLAVA_7B_VISION.flops([576]) == patches + 23 * layer + projector


def test_a_schedule_for_another_depth_is_refused() -> None:
    schedule = Schedule.of({0: "all"}, 32)
    with pytest.raises(ValueError, match="32 layers, the model 40"):
        request_costs(LLAVA_13B, schedule, make_plan(schedule, 4, []), Signal.NONE, 32)


def test_blocks_of_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be >= 1"):
        costs_of(NoPruning(), block_size=0)


def test_token_bytes_are_blocks_without_their_unused_ends() -> None:
    found = costs_of(HiDrop.from_preset("tok48"), images=(576, 576))
    rows = sum(stage.rows * stage.num_layers for stage in found.stages)
    assert found.kv_token_bytes == rows * LLAVA_7B.kv_bytes_per_row
    assert found.dense_kv_token_bytes == (2 * 576 + 64) * 32 * LLAVA_7B.kv_bytes_per_row
    assert found.kv_token_bytes < found.kv_bytes
    exact = costs_of(HiDrop.from_preset("tok48"), images=(576, 576), block_size=1)
    assert exact.kv_bytes == found.kv_token_bytes


def test_a_decode_step_reads_the_weights_once_and_every_request_its_rows() -> None:
    attention, mlp = 3 * (4 + 2 * 2) * 7 + 4 * 7 * 3, 3 * 3 * 5
    assert TINY.num_weights == 4 * (attention + mlp) + 3 * 11
    found = costs_of(FastV(layer=2, keep=0.5), images=(576,), text=64, shape=TINY)
    dense, ours = 4 * 640 * TINY.kv_bytes_per_row, (2 * 640 + 2 * 352) * TINY.kv_bytes_per_row
    weights = 2 * TINY.num_weights
    for batch in (1, 16):
        expected = (weights + batch * dense) / (weights + batch * ours)
        assert ideal_decode_ratio(TINY, found, batch) == pytest.approx(expected)
    assert ideal_decode_ratio(TINY, costs_of(NoPruning(), shape=TINY), 8) == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_prefill_that_reuses_nothing_runs_what_planning_says(name: str) -> None:
    method = METHODS[name]() if name != "hidrop" else HiDrop.from_preset("tok48")
    schedule = method.schedule(PAPER)
    plan = make_plan(schedule, 700, [Span(5, 576)])
    rows = [700 - dropped for dropped in plan.dropped]
    found = flops_run(LLAVA_7B, schedule, plan, method.signal, rows, [0] * len(rows))
    assert found == request_costs(LLAVA_7B, schedule, plan, method.signal, 32).flops


@given(rows=st.integers(1, 40), data=st.data())
def test_reused_rows_are_attended_to_and_not_run(rows: int, data: st.DataObject) -> None:
    reused = data.draw(st.integers(0, rows - 1))
    schedule = Schedule.of({0: "all"}, TINY.num_layers)
    plan = make_plan(schedule, rows, [])
    found = flops_run(TINY, schedule, plan, Signal.NONE, [rows], [reused])
    # Weights of one row: Q, K, V and output of 4 and 2 heads of 7, three MLP matrices; then Q K^T and the sum over V.
    weights = 3 * (4 + 2 + 2) * 7 + 4 * 7 * 3 + 3 * 3 * 5
    by_row = sum(2 * weights + 2 * 2 * 4 * 7 * (row + 1) for row in range(reused, rows))
    assert found == 4 * by_row + 2 * 3 * 11


def test_only_images_that_the_tower_runs_are_counted() -> None:
    plan = make_plan(NoPruning().schedule(PAPER), 1200, [Span(0, 576, 0), Span(600, 576, 1)])
    assert encoder_flops(LLAVA_7B_VISION, plan, []) == 0
    assert encoder_flops(LLAVA_7B_VISION, plan, [1]) == LLAVA_7B_VISION.flops([576])


HYBRID = TextShape(8, 64, 96, 4, 2, 16, 100, recurrence=Recurrence(4, 2, 32, 16, 4, (0, 1, 2, 4, 5, 6)))
"""Layers 3 and 7 attend."""


@pytest.mark.parametrize("rows", [1, 7])
def test_a_recurrent_layer_costs_every_row_the_same(rows: int) -> None:
    mixed, width = 2 * 2 * 32 + 4 * 16, 4 * 16  # Q and K of 2 heads, V of 4
    products = [(64, mixed), (64, width), (64, 2 * 4), (width, 64), (mixed, 4), *[(64, 96)] * 3]
    states = 3 * 2 * 4 * 32 * 16  # for each head three products of a vector with the state
    expected = rows * (2 * sum(into * out for into, out in products) + states)
    assert [HYBRID.layer_flops(rows, layer) for layer in HYBRID.recurrent_layers] == [expected] * 6
    gated = dataclasses.replace(
        TINY, num_layers=8, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_size=16
    )
    assert HYBRID.layer_flops(rows, 3) == gated.layer_flops(rows, 3) + 2 * rows * 64 * 4 * 16


def test_only_layers_with_attention_hold_blocks() -> None:
    schedule = Schedule.of({0: "all", 4: 8, 6: 8}, 8)
    plan = make_plan(schedule, 60, [Span(4, 40)])
    found = request_costs(HYBRID, schedule, plan, Signal.PREVIOUS_ATTENTION, 16)
    assert [stage.kv_blocks for stage in found.stages] == [4, 0, 2]
    assert (found.group_size, [num_groups(schedule, i, HYBRID.recurrent_layers) for i in range(3)]) == (1, [1, 0, 1])
    assert found.dense_kv_token_bytes == 2 * 60 * HYBRID.kv_bytes_per_row
    assert HYBRID.state_bytes == 6 * (4 * 4 * 32 * 16 + 2 * 3 * (2 * 2 * 32 + 4 * 16))
    wide = Schedule.of({0: "all", 4: 8}, 8)
    assert group_size(wide, (0, 1, 2, 4, 5, 6)) == 1
    assert group_size(Schedule.of({0: "all"}, 8), (0, 1, 2, 4)) == 4
