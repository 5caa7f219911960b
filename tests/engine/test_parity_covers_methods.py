"""A method that is added is compared with an independent oracle, in both numberings of rows."""

from tests.engine import test_adaptive_parity, test_oracle_parity, test_renumbered
from vllm_hidrop.methods import METHODS


def test_every_method_has_cases_against_an_oracle() -> None:
    cases = test_oracle_parity.SCHEDULES | test_adaptive_parity.CASES
    assert {name for name, schedules in cases.items() if schedules} == set(METHODS)


def test_every_method_that_cuts_has_cases_with_renumbered_rows() -> None:
    fixed = {choice["method"] for _, choice in test_renumbered.FIXED}
    adaptive = {name for name, settings in test_renumbered.ADAPTIVE.items() if settings}
    assert fixed | adaptive == set(METHODS) - {"none"}
