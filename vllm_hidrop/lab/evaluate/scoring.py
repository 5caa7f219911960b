"""From answers to figures: accuracy with intervals, by type, and two arms compared. Knows no server."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_hidrop.lab.evaluate.asking import Answer
from vllm_hidrop.lab.evaluate.bootstrap import mean_interval, ratio_interval
from vllm_hidrop.lab.evaluate.samples import Sample, Scored, Task


def score_all(task: Task, samples: Sequence[Sample], answers: Mapping[str, Answer]) -> list[Scored]:
    """A score for every sample; a failed request scores 0 and says so."""
    return [_scored(task, sample, answers[sample.id]) for sample in samples]


def _scored(task: Task, sample: Sample, answer: Answer) -> Scored:
    if answer.text is None:
        return Scored(sample, 0.0, failed=True)
    return Scored(sample, task.score(sample, answer.text))


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
    scores = [one.score for one in scored]
    return {"accuracy": sum(scores) / len(scored), "interval": mean_interval(scores, seed)}


def by_type(scored: Iterable[Scored]) -> dict[str, list[Scored]]:
    """The scored samples of each type, in order of first appearance."""
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.sample.type, []).append(one)
    return groups


def mean_tokens(answers: Iterable[Answer]) -> float | None:
    """Mean over the answers that carry a report; None when none does."""
    known = [answer.vision_tokens for answer in answers if answer.vision_tokens is not None]
    return sum(known) / len(known) if known else None


def compare(dense: Sequence[Scored], pruned: Sequence[Scored], seed: int) -> dict[str, Any]:
    """Accuracies of the two arms on the same questions, ``retention`` their ratio, intervals paired by question.

    Retention is None where the dense arm answers nothing right.
    """
    by_kind = by_type(pruned)
    return {
        **_ratio(dense, pruned),
        "intervals": _intervals(dense, pruned, seed),
        "by_type": {
            kind: {
                **_ratio(group, by_kind[kind]),
                "questions": len(group),
                "intervals": _intervals(group, by_kind[kind], seed),
            }
            for kind, group in by_type(dense).items()
        },
    }


def _ratio(dense: Sequence[Scored], pruned: Sequence[Scored]) -> dict[str, float | None]:
    below, above = (sum(one.score for one in scored) / len(scored) for scored in (dense, pruned))
    return {"dense": below, "hidrop": above, "retention": above / below if below else None}


def _intervals(dense: Sequence[Scored], pruned: Sequence[Scored], seed: int) -> dict[str, Any]:
    below, above = ([one.score for one in scored] for scored in (dense, pruned))
    return {
        "dense": mean_interval(below, seed),
        "hidrop": mean_interval(above, seed),
        "retention": ratio_interval(above, below, seed),
    }
