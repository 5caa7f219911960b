"""The intervals against closed forms and properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hidrop.lab.evaluate.scoring import mean_interval, ratio_interval

SCORES = st.lists(st.sampled_from([0.0, 0.3, 0.6, 1.0]), min_size=1, max_size=40)


@settings(max_examples=50)
@given(SCORES, st.integers(0, 5))
def test_an_interval_lies_within_the_scores_and_repeats_by_seed(scores: list[float], seed: int) -> None:
    low, high = mean_interval(scores, seed, 200)
    assert min(scores) - 1e-12 <= low <= high <= max(scores) + 1e-12
    assert mean_interval(scores, seed, 200) == (low, high)


@settings(max_examples=30)
@given(SCORES)
def test_one_minus_the_scores_mirrors_the_interval(scores: list[float]) -> None:
    low, high = mean_interval(scores, 1, 200)
    assert mean_interval([1 - score for score in scores], 1, 200) == pytest.approx((1 - high, 1 - low))


@settings(max_examples=30)
@given(SCORES.filter(any))
def test_the_ratio_of_equal_scores_is_exactly_1(scores: list[float]) -> None:
    assert ratio_interval(scores, scores, 0, 200) == pytest.approx((1, 1))


def test_the_interval_of_many_scores_is_the_normal_one() -> None:
    scores = np.random.default_rng(0).random(2000) < 0.7
    mean = float(scores.mean())
    half = 1.96 * math.sqrt(mean * (1 - mean) / len(scores))
    assert mean_interval(scores.astype(float).tolist()) == pytest.approx((mean - half, mean + half), abs=0.002)


def test_pairing_makes_the_ratio_narrower_than_unpaired_means() -> None:
    dense = [1.0] * 70 + [0.0] * 30
    pruned = [1.0] * 65 + [0.0] * 35
    interval = ratio_interval(pruned, dense)
    assert interval is not None
    assert interval[0] < 65 / 70 < interval[1] <= 1
    low, high = mean_interval(dense)
    assert interval[1] - interval[0] < (high - low) / (70 / 100)


def test_no_right_answer_has_no_ratio_and_no_scores_are_refused() -> None:
    assert ratio_interval([1.0, 0.0], [0.0, 0.0]) is None
    with pytest.raises(ValueError, match="no scores"):
        mean_interval([])
    with pytest.raises(ValueError, match="got 1 and 2"):
        ratio_interval([1.0], [1.0, 0.0])
