"""A request's record, from its plan over runs, decisions and preemptions."""

from collections.abc import Callable

import pytest

from vllm_hidrop.engine.records import Life, Record
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import Plan
from vllm_hidrop.plan.schedule import Schedule

SCHEDULE = Schedule.of({0: "all", 2: 3}, 4)
PLAN = Plan(10, (Span(2, 6),), ((6,), (3,)), adaptive=True)
KEPT = ((6,), (2,))


def run(record: Record) -> None:
    record.ran((10, 6), 1.5)


def test_what_was_decided_stays_when_the_prompt_runs_again() -> None:
    record = Record.of(PLAN)
    run(record)
    record.decided(KEPT)
    record.holds(SCHEDULE)
    assert record.plan.kept == record.prefill_plan.kept == KEPT
    record.preempted()
    assert (record.life, record.plan.kept) == (Life.PREEMPTED, KEPT)
    run(record)
    record.decided(KEPT)


def test_a_report_is_made_anew_after_every_step_of_its_life() -> None:
    record = Record.of(PLAN)
    steps: list[Callable[[], None]] = [lambda: run(record), lambda: record.decided(KEPT), record.preempted]
    for step in steps:
        record.report = {"rows": 10}
        step()
        assert record.report is None


def test_the_workers_word_may_come_after_a_preemption() -> None:
    record = Record.of(PLAN)
    record.preempted()
    run(record)
    record.decided(KEPT)
    record.preempted()
    assert record.plan.kept == KEPT


def test_a_run_before_a_preemption_and_one_after_it_may_follow_each_other() -> None:
    record = Record.of(PLAN)
    record.preempted()
    run(record)
    run(record)
    assert record.life is Life.RAN


def test_nothing_is_decided_before_the_prompt_ran() -> None:
    record = Record.of(PLAN)
    with pytest.raises(AssertionError, match="planned cannot be decided"):
        record.decided(KEPT)
    with pytest.raises(AssertionError, match="is planned"):
        record.holds(SCHEDULE)
