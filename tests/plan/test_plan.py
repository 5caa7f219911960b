"""Keeps, schedules and plans: arithmetic on host ints."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import Plan, make_plan
from vllm_hidrop.plan.schedule import Keep, KeepValue, Schedule

settings.load_profile("ci")  # no deadline on a shared machine, the same examples every time

shares = st.integers(1, 1_000).flatmap(lambda per: st.integers(1, per).map(lambda count: f"{count}/{per}"))
keep_values = st.one_of(
    st.just("all"), st.integers(0, 10_000), st.floats(0, 1, allow_nan=False, allow_subnormal=False), shares
)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Valid for an image of any size: maybe late injection, then falling fractions, then counts, maybe an exit."""
    fractions = sorted(draw(st.lists(st.floats(0.01, 1), max_size=4)), reverse=True)
    held: list[KeepValue] = ["all", *fractions]
    if draw(st.booleans()):
        held = ["all", *sorted(draw(st.lists(st.integers(1, 600), max_size=4)), reverse=True)]
    keeps: list[KeepValue] = [*([0] if draw(st.booleans()) else []), *held, *([0] if draw(st.booleans()) else [])]
    num_layers = draw(st.integers(len(keeps), 48))
    cuts = draw(
        st.lists(st.integers(1, max(1, num_layers - 1)), min_size=len(keeps) - 1, max_size=len(keeps) - 1, unique=True)
    )
    return Schedule.of(dict(zip([0, *sorted(cuts)], keeps, strict=True)), num_layers)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[Span]]:
    """A prompt's length and the spans of its images; text stands before, between and after them."""
    spans, offset = [], draw(st.integers(0, 40))
    for length in draw(st.lists(st.integers(1, 700), max_size=4)):
        spans.append(Span(offset, length))
        offset += length + draw(st.integers(0, 20))
    return offset + draw(st.integers(1, 60)), spans


@given(keep_values)
def test_a_keep_survives_dump_and_parse(value: KeepValue) -> None:
    keep = Keep.parse(value)
    assert Keep.parse(keep.dump()) == keep
    assert Keep.parse(json.loads(json.dumps(keep.dump()))) == keep


@given(keep_values, st.integers(0, 5_000))
def test_a_keep_never_exceeds_the_image(value: KeepValue, num_tokens: int) -> None:
    keep = Keep.parse(value)
    kept = keep.resolve(num_tokens)
    assert 0 <= kept <= num_tokens
    assert not keep.is_all or kept == num_tokens
    assert not keep.is_none or kept == 0


@given(keep_values, st.integers(0, 2_000), st.integers(0, 2_000))
def test_a_larger_image_keeps_no_fewer_tokens(value: KeepValue, small: int, more: int) -> None:
    keep = Keep.parse(value)
    assert keep.resolve(small) <= keep.resolve(small + more)


@pytest.mark.parametrize(("value", "num_tokens", "kept"), [(0.1, 10, 1), (0.3, 10, 3), (0.7, 10, 7), (0.29, 100, 29)])
def test_a_decimal_fraction_is_exact(value: float, num_tokens: int, kept: int) -> None:
    assert Keep.parse(value).resolve(num_tokens) == kept


@pytest.mark.parametrize(
    ("value", "num_tokens", "kept"),
    [("10/576", 576, 10), ("10/576", 1000, 17), ("1/576", 100, 1), ("1/576", 0, 0), ("215/576", 1, 1), ("8/8", 9, 9)],
)
def test_a_share_is_rounded_and_never_nothing(value: str, num_tokens: int, kept: int) -> None:
    assert Keep.parse(value).resolve(num_tokens) == kept


def test_shares_and_fractions_fall_together() -> None:
    Schedule.of({0: "all", 2: "10/20", 4: 0.25, 6: "1/8"}, 8)
    with pytest.raises(ValueError, match="must not rise"):
        Schedule.of({0: "all", 2: "1/8", 4: 0.25}, 8)


NO_SHARES = ("0/5", "6/5", "1/0", "1/", "/5", "-1/5", "1 / 5", "1/5/5")


@pytest.mark.parametrize(
    "value", [*NO_SHARES, "half", "", True, -1, -0.1, 1.5, float("nan"), float("inf"), None, [1], (0.5,)]
)
def test_what_is_no_keep_is_refused(value: KeepValue) -> None:
    with pytest.raises(ValueError, match="keep"):
        Keep.parse(value)


def test_a_keep_is_not_both_count_and_fraction() -> None:
    with pytest.raises(ValueError, match="not both"):
        Keep(count=1, fraction=Keep.parse(0.5).fraction)


@given(schedules())
def test_a_schedule_survives_dump_and_load(schedule: Schedule) -> None:
    assert Schedule.load(json.loads(json.dumps(schedule.dump()))) == schedule


@given(schedules())
def test_stages_cover_every_layer_once(schedule: Schedule) -> None:
    covered = [
        layer
        for stage, end in zip(schedule.stages, schedule.end_layers, strict=True)
        for layer in range(stage.first_layer, end)
    ]
    assert covered == list(range(schedule.num_layers))
    by_layer = [schedule.stage_of_layer(layer) for layer in covered]
    counts = [schedule.layers_in(stage) for stage in range(len(schedule.stages))]
    assert [by_layer.count(stage) for stage in range(len(schedule.stages))] == counts


@given(schedules(), st.integers(1, 1_000))
def test_the_mean_is_over_all_layers(schedule: Schedule, num_tokens: int) -> None:
    kept = schedule.kept(num_tokens)
    by_layer = [kept[schedule.stage_of_layer(layer)] for layer in range(schedule.num_layers)]
    assert schedule.mean_kept(num_tokens) == sum(by_layer) / len(by_layer)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_outside_the_model_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=r"layer must be in \[0, 4\)"):
        Schedule.of({0: "all"}, 4).stage_of_layer(layer)


@given(schedules(), schedules())
def test_other_keeps_need_one_value_per_stage(schedule: Schedule, other: Schedule) -> None:
    keeps = [stage.keep.dump() for stage in other.stages]
    if len(keeps) != len(schedule.stages):
        with pytest.raises(ValueError, match=f"{len(schedule.stages)} stages, got {len(keeps)}"):
            schedule.with_keeps(keeps)
        return
    changed = schedule.with_keeps(keeps)
    assert changed.end_layers == schedule.end_layers
    assert [stage.keep for stage in changed.stages] == [stage.keep for stage in other.stages]


def test_other_keeps_obey_the_invariants() -> None:
    with pytest.raises(ValueError, match="must not rise"):
        Schedule.of({0: "all", 2: 5, 4: 2}, 8).with_keeps(["all", 2, 5])


@pytest.mark.parametrize(
    ("keeps", "message"),
    [
        ({}, "must start at layer 0"),
        ({1: "all"}, "must start at layer 0"),
        ({-1: "all", 0: 5}, "must start at layer 0"),
        ({0: "all", 8: 5}, "a stage starts at layer 8, the model has 8"),
        ({0: 0, 2: 5}, "late injection brings in every vision token"),
        ({0: 0, 2: 0.5}, "late injection brings in every vision token"),
        ({0: "all", 2: 5, 4: 6}, "must not rise after injection, got 5 then 6"),
        ({0: "all", 2: 0.25, 4: 0.5}, "must not rise after injection, got 0.25 then 0.5"),
        ({0: "all", 2: 5, 4: "all"}, "must not rise after injection, got 5 then all"),
        ({0: 0, 1: "all", 2: 0, 3: "all"}, "must not rise after injection, got 0 then all"),
    ],
)
def test_a_broken_schedule_is_refused_with_its_reason(keeps: dict[int, KeepValue], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.of(keeps, 8)


@given(schedules(), prompts())
def test_a_plan_keeps_within_every_image_and_never_rises(schedule: Schedule, prompt: tuple[int, list[Span]]) -> None:
    num_tokens, spans = prompt
    plan = make_plan(schedule, num_tokens, spans)
    for image, span in enumerate(plan.spans):
        column = [stage[image] for stage in plan.kept]
        assert all(0 <= kept <= span.length for kept in column)
        injected = [kept for kept in column if kept]
        assert all(after <= before for before, after in pairwise(injected))
        assert not injected or injected[0] == span.length


@given(schedules(), prompts())
def test_what_is_dropped_and_what_is_kept_add_up(schedule: Schedule, prompt: tuple[int, list[Span]]) -> None:
    num_tokens, spans = prompt
    plan = make_plan(schedule, num_tokens, spans)
    num_text = num_tokens - sum(span.length for span in spans)
    for stage, kept in enumerate(plan.kept):
        assert plan.dropped[stage] == plan.num_vision_tokens - sum(kept)
        assert plan.stage_tokens(stage, num_tokens) == num_text + sum(kept)
        assert plan.stage_tokens(stage, num_tokens + 7) == num_text + sum(kept) + 7
        assert plan.stage_tokens(stage, 0) == 0
    assert plan.is_pruned == any(plan.dropped)


@given(schedules(), prompts())
def test_off_keeps_everything_everywhere(schedule: Schedule, prompt: tuple[int, list[Span]]) -> None:
    num_tokens, spans = prompt
    plan = make_plan(schedule, num_tokens, spans, keep_all=True)
    assert not plan.is_pruned
    assert plan.fallback is None
    assert all(plan.stage_tokens(stage, 3) == 3 for stage in range(len(schedule.stages)))


@given(prompts())
def test_images_are_planned_in_prompt_order(prompt: tuple[int, list[Span]]) -> None:
    num_tokens, spans = prompt
    schedule = Schedule.of({0: "all", 1: 0.5}, 2)
    assert make_plan(schedule, num_tokens, spans[::-1]) == make_plan(schedule, num_tokens, spans)


def test_a_text_prompt_has_nothing_to_drop() -> None:
    plan = make_plan(Schedule.of({0: 0, 1: "all", 2: 5}, 4), 12, [])
    assert plan.dropped == (0, 0, 0)
    assert [plan.stage_tokens(stage, 12) for stage in range(3)] == [12, 12, 12]


def test_a_prompt_that_ends_with_an_image_is_not_pruned_and_says_why() -> None:
    plan = make_plan(Schedule.of({0: 0, 1: "all", 2: 5}, 4), 20, [Span(4, 16)])
    assert plan.kept == ((16,), (16,), (16,))
    assert plan.fallback is not None
    assert "ends with an image" in plan.fallback


def test_a_fraction_below_a_later_count_is_refused_for_an_image_where_keep_would_rise() -> None:
    schedule = Schedule.of({0: "all", 1: 0.1, 2: 5}, 4)
    assert make_plan(schedule, 101, [Span(0, 100)]).kept == ((100,), (10,), (5,))
    with pytest.raises(ValueError, match=r"must not rise after injection, got \[20, 2, 5\]"):
        make_plan(schedule, 21, [Span(0, 20)])


def test_hidrop_tok48_plans_the_papers_cache_lengths() -> None:
    schedule = Schedule.of({0: 0, 8: "all", 10: 87, 14: 10, 16: 5, 18: 1, 24: 0}, 32)
    plan = make_plan(schedule, 35 + 576 + 20, [Span(35, 576)])
    lengths = [plan.stage_tokens(stage, plan.num_prompt_tokens) - 55 for stage in range(7)]
    assert lengths == [0, 576, 87, 10, 5, 1, 0]


def test_a_plan_built_by_hand_obeys_the_invariant_too() -> None:
    with pytest.raises(ValueError, match="must not rise"):
        Plan(20, (Span(0, 10),), ((0,), (5,)))


def test_a_prompt_that_ends_with_an_image_falls_back_only_where_something_would_be_dropped() -> None:
    last = [Span(3, 4)]
    assert make_plan(Schedule.of({0: "all", 1: 1}, 2), 7, last).fallback is not None
    assert make_plan(Schedule.of({0: "all"}, 2), 7, last).fallback is None
    assert make_plan(Schedule.of({0: "all", 1: 9}, 2), 7, last).fallback is None
    assert make_plan(Schedule.of({0: "all", 1: 1}, 2), 8, last).fallback is None


@given(schedules(), prompts())
def test_before_the_first_cut_a_stage_holds_an_image_whole_or_not_at_all(
    schedule: Schedule, prompt: tuple[int, list[Span]]
) -> None:
    num_tokens, spans = prompt
    plan = make_plan(schedule, num_tokens, spans)
    for stage, kept in enumerate(plan.kept):
        whole_or_nothing = all(n in (0, span.length) for n, span in zip(kept, plan.spans, strict=True))
        assert whole_or_nothing or stage >= plan.first_cut
    if plan.first_cut < len(plan.kept):
        assert any(0 < n < span.length for n, span in zip(plan.kept[plan.first_cut], plan.spans, strict=True))


@given(schedules(), prompts(), st.integers(1, 40))
def test_a_prompt_may_start_behind_an_image(
    schedule: Schedule, prompt: tuple[int, list[Span]], block_size: int
) -> None:
    num_tokens, spans = prompt
    plan = make_plan(schedule, num_tokens, spans)
    if not plan.is_pruned:
        return
    prefix = plan.spans[0].offset
    plan = replace(plan, prefix_tokens=prefix, carried_from=prefix // block_size * block_size)
    for image, span in enumerate(plan.spans):
        for stage, kept in enumerate(plan.kept):
            held = span.end - sum(s.length - n for s, n in zip(plan.spans[: image + 1], kept, strict=False))
            expected = held if stage < plan.first_cut else plan.carried_from
            assert plan.stage_tokens(stage, span.end) == expected
        if 0 < plan.first_cut < len(plan.kept):
            places = plan.places_carried(span.end)
            assert len(places) == plan.num_carried(span.end)
            assert set(places) >= set(range(plan.carried_from, prefix))
            there = plan.kept[plan.first_cut - 1][image]
            assert {place in places for place in range(span.offset, span.end)} == {bool(there)}
