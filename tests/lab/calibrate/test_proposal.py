import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_hidrop.lab.calibrate.proposal import (
    Boundaries,
    Proposal,
    boundaries,
    exit_layer,
    filter_layers,
    fusion_layer,
    injection_layer,
    keep_counts,
    local_maxima,
    propose,
    stage_layers,
    tail_keeps,
)
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.methods.hidrop import HiDrop

PAPER = Boundaries(9, 25)
SHAPE = (32, 576)


@pytest.mark.parametrize(
    ("budget", "filters", "keeps"),
    [
        (48, (10, 14, 16, 18), (87, 10, 5, 1)),
        (64, (10, 14, 16, 18), (215, 10, 5, 1)),
        (80, (10, 13, 16, 19), (453, 10, 5, 1)),
        (48, (10, 13, 16, 19), (112, 10, 5, 1)),
    ],
)
def test_keep_counts_are_those_of_the_released_scripts(
    budget: int, filters: tuple[int, ...], keeps: tuple[int, ...]
) -> None:
    assert keep_counts(PAPER, filters, SHAPE, budget) == keeps


@pytest.mark.parametrize(
    ("num_filters", "tokens", "tail"),
    [
        (1, 576, ()),
        (2, 576, (10,)),
        (3, 576, (10, 1)),
        (5, 576, (10, 7, 4, 1)),
        (4, 2880, (50, 25, 5)),
        (4, 9, (1,) * 3),
    ],
)
def test_the_tail_stretches_to_filters_and_image(num_filters: int, tokens: int, tail: tuple[int, ...]) -> None:
    assert tail_keeps(num_filters, tokens) == tail


def test_a_budget_below_the_whole_image_layers_names_the_least_mean() -> None:
    with pytest.raises(
        ValueError, match=r"layers 9 to 10 hold all 576 tokens and alone cost a mean of 36\.0.*is 38\.4"
    ):
        keep_counts(PAPER, (10, 14, 16, 18), SHAPE, 38)
    assert keep_counts(PAPER, (10, 14, 16, 18), SHAPE, 38.4)[0] >= 10


def test_a_budget_above_every_first_keep_names_the_most_mean() -> None:
    with pytest.raises(
        ValueError, match=r"budget 200 cannot be used up: the most this schedule reaches is 109\.1 of 576"
    ):
        keep_counts(PAPER, (10, 14, 16, 18), SHAPE, 200)


def test_no_room_for_a_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer to filter at between injection 9 and exit 11"):
        keep_counts(Boundaries(9, 11), (), SHAPE, 64)


def test_local_maxima_take_the_first_of_a_plateau_and_either_end() -> None:
    assert local_maxima([3, 1, 2, 2, 1, 4]) == [1, 3, 6]
    assert local_maxima([1]) == [1]


def test_text_is_fused_where_a_tenth_of_the_fall_has_happened() -> None:
    assert fusion_layer([1, 0.99, 0.9, 0.5, 0.4]) == 3
    assert fusion_layer([1, 1, 1]) is None


def test_injection_is_the_last_vision_minimum_before_text_fuses() -> None:
    vision = [0.3, 0.9, 0.8, 0.95, 0.7, 0.96, 0.6, 0.97]
    cross = [1, 1, 1, 1, 1, 0.8, 0.5, 0.5]
    assert injection_layer(vision, cross) == (5, None)


def test_injection_without_a_minimum_is_where_text_fuses_and_without_fusion_layer_1() -> None:
    rising = [0.1, 0.2, 0.3, 0.4]
    layer, note = injection_layer(rising, [1, 1, 0.5, 0.5])
    assert layer == 3
    assert note is not None
    assert "no local minimum" in note
    layer, note = injection_layer(rising, [1, 1, 1, 1])
    assert (layer, note) == (1, "no layer's text depends on the image: inject at layer 1")


def test_exit_is_the_first_of_an_unbroken_run_within_the_tolerance() -> None:
    assert exit_layer([1.0, 0.5, 0.985, 0.99, 1.0], 0.01) == 4
    assert exit_layer([1.0, 0.5, 0.985, 0.99, 1.0], 0.02) == 3
    assert exit_layer([0.0, 0.0], 0.01) == 3
    assert exit_layer([1.0, 1.0], 0.0) == 1


def test_boundaries_move_apart_to_leave_room_and_say_so() -> None:
    where = boundaries([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 0.5], [1.0] * 4, 0.01)
    assert (where.inject_layer, where.exit_layer) == (3, 5)
    assert len(where.notes) == 3
    never = boundaries([0.5, 0.9, 0.5, 0.9], [1, 1, 0.5, 0.5], [0.0] * 4, 0.01)
    assert (never.inject_layer, never.exit_layer) == (3, 5)
    assert "no early exit" in never.notes[0]


def test_a_filter_stands_before_the_layer_whose_attention_lasts() -> None:
    curve = [0.9, 0.1, 0.1, 0.5, 0.2, 0.3, 0.6, 0.2]
    assert filter_layers(curve, Boundaries(2, 9), 2) == (3, 6)  # peaks at layers 4 and 7
    assert filter_layers(curve, Boundaries(2, 9), 1) == (6,)
    assert filter_layers(curve, Boundaries(2, 9), 3) == (3, 5, 6)  # filled up by layer 6


def test_options_count_no_early_exit_as_none() -> None:
    proposal = Proposal(Boundaries(2, 9), (3,), (5,), (8, 64))
    assert proposal.options()["exit_layer"] is None
    assert HiDrop(1, (3,), (5,), None, (8, 64)).schedule(ModelShape(8, 64))


@st.composite
def measured(draw: st.DrawFn) -> tuple[dict[str, list[float]], int, int]:
    num_layers = draw(st.integers(4, 40))
    share = st.floats(0, 1)
    curves = {
        name: draw(st.lists(share, min_size=num_layers, max_size=num_layers)) for name in ("vision_intra", "cross")
    }
    curves["agreement"] = draw(st.lists(st.sampled_from([0.5, 1.0]), min_size=num_layers, max_size=num_layers))
    window = draw(st.integers(1, 2))
    curves["ilvas"] = draw(st.lists(share, min_size=num_layers - window, max_size=num_layers - window))
    return curves, draw(st.integers(1, 3000)), draw(st.integers(1, 8))


@pytest.mark.parametrize("num_layers", range(3, 60))
def test_the_least_and_the_most_budget_are_met(num_layers: int) -> None:
    """102 / 21 * 21 < 102 in floats."""
    where = Boundaries(inject_layer=1, exit_layer=num_layers + 1, notes=())
    for keep in (1, 82):
        budget = (82 + keep * (num_layers - 1)) / num_layers
        assert keep_counts(where, (1,), (num_layers, 82), budget) == (keep,)


@given(measured(), st.floats(0, 1))
def test_every_schedule_is_valid_and_within_one_token_of_the_budget(
    found: tuple[dict[str, list[float]], int, int], where: float
) -> None:
    curves, num_tokens, num_filters = found
    bounds = boundaries(curves["vision_intra"], curves["cross"], curves["agreement"], 0.01)
    filters = filter_layers(curves["ilvas"], bounds, num_filters)
    if not filters:
        return
    shape = (len(curves["cross"]), num_tokens)
    tail = tail_keeps(len(filters), num_tokens)
    least, most = (
        Proposal(bounds, filters, (first, *tail), shape).schedule().mean_kept(num_tokens)
        for first in (max(tail, default=1), num_tokens)
    )
    budget = least + where * (most - least)
    proposal = propose(curves, ModelShape(len(curves["cross"]), num_tokens), budget, 0.01, num_filters)
    granularity = stage_layers(bounds, filters)[1] / shape[0]
    assert -1e-6 <= proposal.schedule().mean_kept(num_tokens) - budget < granularity + 1e-6
