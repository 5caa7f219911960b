"""Plans whose counts are bounds until a prompt has run, and what its caches hold then."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import Plan, make_plan
from vllm_hidrop.plan.schedule import Cached, Schedule

settings.load_profile("ci")  # no deadline on a shared machine, the same examples every time

SPANS = [Span(2, 10), Span(15, 6)]
STAGES = Schedule.of({0: "all", 2: "all", 5: "all"}, 8, {0: "none", 2: "final"})


def adaptive(schedule: Schedule = STAGES) -> Plan:
    return make_plan(schedule, 30, SPANS, adaptive=True)


cacheds = st.dictionaries(st.sampled_from([0, 2, 5]), st.sampled_from(Cached))


@given(cacheds)
def test_what_is_cached_survives_dump_and_load(cached: dict[int, Cached]) -> None:
    schedule = Schedule.of({0: "all", 2: 9, 5: 0}, 8, cached)
    assert [stage.cached for stage in schedule.stages] == [cached.get(first, Cached.KEPT) for first in (0, 2, 5)]
    assert Schedule.load(json.loads(json.dumps(schedule.dump()))) == schedule
    assert schedule.with_keeps([9, 9, 9]).dump()["cached"] == schedule.dump()["cached"]


def test_schedules_differ_by_what_they_cache_and_old_dumps_load() -> None:
    plain = Schedule.of({0: "all", 2: "all", 5: "all"}, 8)
    assert plain != STAGES
    assert plain.dump()["cached"] == {}
    assert Schedule.load({"num_layers": 8, "keeps": {"0": "all", "2": "all", "5": "all"}}) == plain


def test_an_unknown_way_of_caching_is_refused() -> None:
    with pytest.raises(ValueError, match="half"):
        Schedule.of({0: "all"}, 8, {0: "half"})


def test_an_adaptive_plan_keeps_all_as_a_bound_and_is_not_decided() -> None:
    plan = adaptive()
    assert plan.kept == ((10, 6),) * 3
    assert plan.dropped == (0, 0, 0)
    assert (plan.adaptive, plan.decided, plan.is_pruned, plan.fallback) == (True, False, True, None)


def test_an_adaptive_plans_bounds_are_the_schedules_keeps() -> None:
    plan = adaptive(Schedule.of({0: "all", 2: 7, 5: 0}, 8))
    assert plan.kept == ((10, 6), (7, 6), (0, 0))
    assert not plan.decided


@pytest.mark.parametrize("keep_all", [False, True])
def test_an_adaptive_method_leaves_text_alone(keep_all: bool) -> None:
    plan = make_plan(STAGES, 9, [], keep_all, adaptive=True)
    assert (plan.adaptive, plan.decided, plan.is_pruned, plan.fallback) == (False, True, False, None)


@pytest.mark.parametrize("num_prompt_tokens", [30, 21])
def test_off_is_dense_under_an_adaptive_method_too(num_prompt_tokens: int) -> None:
    plan = make_plan(STAGES, num_prompt_tokens, SPANS, keep_all=True, adaptive=True)
    assert (plan.adaptive, plan.decided, plan.is_pruned, plan.fallback) == (False, True, False, None)
    assert plan.kept == ((10, 6),) * 3


@pytest.mark.parametrize("schedule", [STAGES, Schedule.of({0: "all"}, 8), Schedule.of({0: "all", 2: 7}, 8)])
def test_a_prompt_that_ends_with_an_image_runs_dense_and_says_why(schedule: Schedule) -> None:
    plan = make_plan(schedule, 21, SPANS, adaptive=True)
    assert plan.fallback is not None
    assert "ends with an image" in plan.fallback
    assert (plan.adaptive, plan.decided, plan.is_pruned) == (False, True, False)
    assert set(plan.kept) == {(10, 6)}
    assert plan.after_prefill(schedule) is plan


def test_one_stage_may_still_be_adaptive() -> None:
    plan = adaptive(Schedule.of({0: "all"}, 8))
    assert plan.is_pruned
    assert plan.kept == ((10, 6),)


def test_a_bound_holds_from_its_stage_on_and_never_raises() -> None:
    plan = adaptive(Schedule.of({0: "all", 2: 7, 5: 3}, 8))
    assert plan.bounded(1, [5, 9]).kept == ((10, 6), (5, 6), (3, 3))
    assert plan.bounded(2, [0, 1]).kept == ((10, 6), (7, 6), (0, 1))
    assert plan.bounded(0, [10, 6]) == plan


counts = st.tuples(st.integers(0, 12), st.integers(0, 8))


@given(st.lists(st.tuples(st.integers(0, 2), counts), max_size=5))
def test_bounds_in_any_order_are_the_smallest(bounds: list[tuple[int, tuple[int, int]]]) -> None:
    plan = adaptive()
    for stage, kept in bounds:
        plan = plan.bounded(stage, kept)
    for stage, most in enumerate(plan.kept):
        for image, span in enumerate(SPANS):
            assert most[image] == min([span.length, *(b[image] for first, b in bounds if first <= stage)])
    assert not plan.decided


@given(st.lists(counts, min_size=3, max_size=3))
def test_a_plan_is_settled_within_its_bounds_only(kept: list[tuple[int, int]]) -> None:
    plan = adaptive()
    over = [stage for stage, (first, second) in enumerate(kept) if first > 10 or second > 6]
    rises = any(after > before for column in zip(*kept, strict=True) for before, after in pairwise(column))
    if over:
        with pytest.raises(ValueError, match=f"stage {over[0]} keeps .* more than the bound"):
            plan.settled(kept)
    elif not rises:
        settled = plan.settled([list(each) for each in kept])
        assert settled.kept == tuple(kept)
        assert settled.decided
        assert settled.adaptive
        assert hash(settled) == hash(plan.settled(kept))


def test_what_is_settled_may_not_rise_and_has_a_count_for_every_stage_and_image() -> None:
    with pytest.raises(ValueError, match="must not rise"):
        adaptive().settled([(10, 6), (3, 3), (4, 3)])
    with pytest.raises(ValueError, match="zip"):
        adaptive().settled([(10, 6), (3, 3)])
    with pytest.raises(ValueError, match="zip"):
        adaptive().settled([(10, 6), (3, 3), (3,)])


def test_caches_hold_what_ran_or_what_was_left_or_nothing() -> None:
    schedule = Schedule.of({0: "all", 2: "all", 5: "all", 6: "all"}, 8, {0: "none", 2: "final"})
    plan = adaptive(schedule).settled([(10, 6), (8, 6), (5, 2), (1, 0)])
    held = plan.after_prefill(schedule)
    assert held.kept == ((0, 0), (1, 0), (5, 2), (1, 0))
    assert held.stage_tokens(0, 30) == 14
    assert held.stage_tokens(2, 31) == 14 + 7 + 1
    assert held.has_run
    assert plan.kept == ((10, 6), (8, 6), (5, 2), (1, 0))


def test_a_plan_that_is_not_adaptive_caches_what_ran() -> None:
    plan = make_plan(STAGES.with_keeps(["all", 5, 1]), 30, SPANS)
    assert plan.after_prefill(STAGES) is plan


def test_an_image_without_tokens_is_planned_like_any_other() -> None:
    plan = make_plan(STAGES, 9, [Span(2, 0), Span(3, 4)], adaptive=True)
    assert plan.kept == ((0, 4), (0, 4), (0, 4))
    settled = plan.settled([(0, 4), (0, 1), (0, 0)])
    assert settled.after_prefill(STAGES).kept == ((0, 0), (0, 0), (0, 0))
    assert settled.stage_tokens(1, 9) == 6
