"""From answers to figures: accuracy by type, and two arms compared, with bootstrap intervals.

**Source** of the percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_hidrop.lab.evaluate.endpoint import Answer
from vllm_hidrop.lab.evaluate.samples import Sample, Scored, Task

Interval = tuple[float, float]
NUM_RESAMPLES = 2000
LEVEL = 0.95
MAX_DRAWS = 4_000_000
"""Indices drawn at once, which bounds memory to some tens of megabytes."""


def mean_interval(scores: Sequence[float], seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Interval:
    """The 95 % interval of the mean of scores [N]; ValueError without scores."""
    return _percentiles(_resampled([scores], seed, num_resamples)[0])


def ratio_interval(
    above: Sequence[float], below: Sequence[float], seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Interval | None:
    """The 95 % interval of mean(above) / mean(below) over the same questions, resampled together.

    Resamples whose denominator is 0 are left out, None when all are. ValueError: no scores, or unequal numbers of them.
    """
    tops, bottoms = _resampled([above, below], seed, num_resamples)
    is_defined = bottoms > 0
    return _percentiles(tops[is_defined] / bottoms[is_defined]) if is_defined.any() else None


def _resampled(columns: Sequence[Sequence[float]], seed: int, num_resamples: int) -> NDArray[np.float64]:
    """Means [columns, resamples] of score columns that are drawn together."""
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"paired scores must be equally many, got {' and '.join(str(len(one)) for one in columns)}")
    if not len(columns[0]):
        raise ValueError("no scores to resample")
    values = np.asarray(columns, np.float64)
    return np.concatenate([values[:, draw].mean(2) for draw in _draws(values.shape[1], seed, num_resamples)], axis=1)


def _draws(num_scores: int, seed: int, num_resamples: int) -> Iterator[NDArray[np.int64]]:
    """Indices [resamples, num_scores], in blocks of at most ``MAX_DRAWS``."""
    rng = np.random.default_rng(seed)
    at_once = max(1, MAX_DRAWS // num_scores)
    for start in range(0, num_resamples, at_once):
        yield rng.integers(num_scores, size=(min(at_once, num_resamples - start), num_scores))


def _percentiles(values: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def score_all(task: Task, samples: Sequence[Sample], answers: Mapping[str, Answer]) -> list[Scored]:
    """A score for every sample; a failed request scores 0 and is marked."""
    texts = [(sample, answers[sample.id].text) for sample in samples]
    return [
        Scored(sample, 0.0, failed=True) if text is None else Scored(sample, task.score(sample, text))
        for sample, text in texts
    ]


def mean_score(scored: Sequence[Scored]) -> float:
    """Accuracy, failed requests included."""
    return sum(one.score for one in scored) / len(scored)


def summarise(task: Task, scored: Sequence[Scored], answers: Mapping[str, Answer], seed: int) -> dict[str, Any]:
    """The figures of one run as plain data; ``accuracy`` is the mean score over all questions, failed ones included."""
    return {
        "questions": len(scored),
        "failed": sum(one.failed for one in scored),
        **_mean(scored, seed),
        "mean_vision_tokens": mean_tokens(answers[one.sample.id] for one in scored),
        "by_type": {kind: {**_mean(group, seed), "questions": len(group)} for kind, group in by_type(scored).items()},
        "figures": task.figures(scored),
    }


def _mean(scored: Sequence[Scored], seed: int) -> dict[str, Any]:
    return {"accuracy": mean_score(scored), "interval": mean_interval([one.score for one in scored], seed)}


def by_type(scored: Iterable[Scored]) -> dict[str, list[Scored]]:
    """The scored samples of each type, in order of first appearance."""
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.sample.type, []).append(one)
    return groups


def mean_tokens(answers: Iterable[Answer]) -> float | None:
    """Vision tokens, the mean over the answers that carry a report; None when none does."""
    known = [answer.vision_tokens for answer in answers if answer.vision_tokens is not None]
    return sum(known) / len(known) if known else None


def compare(dense: Sequence[Scored], pruned: Sequence[Scored], seed: int) -> dict[str, Any]:
    """Two arms on the same questions: accuracies, ``retention`` (their ratio; None if dense is 0), paired intervals."""
    by_kind = by_type(pruned)
    return {
        **_compared(dense, pruned, seed),
        "by_type": {
            kind: {**_compared(group, by_kind[kind], seed), "questions": len(group)}
            for kind, group in by_type(dense).items()
        },
    }


def _compared(dense: Sequence[Scored], pruned: Sequence[Scored], seed: int) -> dict[str, Any]:
    below, above = ([one.score for one in scored] for scored in (dense, pruned))
    accuracy = {"dense": mean_score(dense), "hidrop": mean_score(pruned)}
    return {
        **accuracy,
        "retention": accuracy["hidrop"] / accuracy["dense"] if accuracy["dense"] else None,
        "intervals": {
            "dense": mean_interval(below, seed),
            "hidrop": mean_interval(above, seed),
            "retention": ratio_interval(above, below, seed),
        },
    }


def difference(before: Sequence[Scored], after: Sequence[Scored], seed: int) -> dict[str, Any]:
    """Accuracy of ``after`` less that of ``before`` on the same questions, with its paired interval."""
    scores = [one.score - other.score for one, other in zip(after, before, strict=True)]
    return {"difference": sum(scores) / len(scores), "interval": mean_interval(scores, seed)}
