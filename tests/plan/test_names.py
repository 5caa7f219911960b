"""Misspelt names are told with the one that was meant."""

import pytest

from vllm_hidrop.plan.names import nearest, unknown
from vllm_hidrop.plan.planner import Alternative, Planner
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.plan.schedule import Schedule


def test_the_near_name_is_suggested_and_a_far_one_is_not() -> None:
    known = ("none", "fastv")
    assert unknown("unknown method", "fastvv", known) == (
        "unknown method 'fastvv'; known: none, fastv; did you mean 'fastv'?"
    )
    assert nearest("zzz", known) == ""
    assert nearest(3, known) == ""


def test_where_there_are_no_names_none_is_not_offered_as_one() -> None:
    assert unknown("method 'none' has no option", "a", ()) == "method 'none' has no option 'a': there are none"


def test_a_requests_misspelt_method_and_key_are_told_with_the_near_one() -> None:
    method = Alternative(Schedule.of({0: "all", 2: 0.5}, 4), None, False)
    planner = Planner("fastv", None, {"fastv": method, "random": method}, 100, PositionScheme.PERSISTENT)
    with pytest.raises(ValueError, match=r"requests may use fastv, random; did you mean 'random'\?$"):
        planner.plan(10, [], {"hidrop_method": "randm"})
    with pytest.raises(ValueError, match=r"'hidrop_methd'; known: .*; did you mean 'hidrop_method'\?$"):
        planner.plan(10, [], {"hidrop_methd": "random"})
