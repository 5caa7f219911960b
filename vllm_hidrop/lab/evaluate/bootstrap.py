"""Percentile bootstrap intervals of means and of ratios of paired means. Knows only arrays.

**Source**: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Floats = NDArray[np.float64]

NUM_RESAMPLES = 2000
LEVEL = 0.95
MAX_DRAWS = 4_000_000
"""Indices drawn at once: bounds memory to some tens of megabytes."""


def mean_interval(scores: Sequence[float], seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Interval:
    """The 95 % interval of the mean of scores [N].

    Raises:
        ValueError: no scores.
    """
    values = _array(scores)
    means = np.concatenate([values[draw].mean(1) for draw in _draws(len(values), seed, num_resamples)])
    return _percentiles(means)


def ratio_interval(
    above: Sequence[float], below: Sequence[float], seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Interval | None:
    """The 95 % interval of mean(above) / mean(below) over the same questions, resampled together.

    Resamples whose denominator is 0 are left out; ``None`` when all are.

    Raises:
        ValueError: no scores, or not the same number of both.
    """
    over, under = _array(above), _array(below)
    if len(over) != len(under):
        raise ValueError(f"paired scores must be equally many, got {len(over)} and {len(under)}")
    pairs = [(over[draw].mean(1), under[draw].mean(1)) for draw in _draws(len(over), seed, num_resamples)]
    tops, bottoms = (np.concatenate(column) for column in zip(*pairs, strict=True))
    is_defined = bottoms > 0
    return _percentiles(tops[is_defined] / bottoms[is_defined]) if is_defined.any() else None


def _array(scores: Sequence[float]) -> Floats:
    if not len(scores):
        raise ValueError("no scores to resample")
    return np.asarray(scores, np.float64)


def _draws(num_scores: int, seed: int, num_resamples: int) -> Iterator[NDArray[np.int64]]:
    """Indices [resamples, num_scores], some resamples at a time."""
    rng = np.random.default_rng(seed)
    at_once = max(1, MAX_DRAWS // num_scores)
    for start in range(0, num_resamples, at_once):
        yield rng.integers(num_scores, size=(min(at_once, num_resamples - start), num_scores))


def _percentiles(values: Floats) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
