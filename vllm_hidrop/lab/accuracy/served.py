"""Serves rows one server at a time and scores what they answer. Knows no table."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_hidrop.cli.local_server import local_server
from vllm_hidrop.lab.accuracy.rows import Group, Row, described
from vllm_hidrop.lab.evaluate.asking import Endpoint
from vllm_hidrop.lab.evaluate.bootstrap import mean_interval
from vllm_hidrop.lab.evaluate.journal import FILE, Journal
from vllm_hidrop.lab.evaluate.reading import has_fields, read_json_lines
from vllm_hidrop.lab.evaluate.run import Exam, Outcome, take
from vllm_hidrop.lab.evaluate.samples import Scored
from vllm_hidrop.lab.evaluate.scoring import compare, score_all, summarise

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""What ``hidrop serve`` sets for the shipped checkpoints, for the others too."""
MAIN_ABLATION = "ablation/hidrop"


def offline() -> None:
    """Set :data:`ENVIRONMENT` for the servers to come, where nothing else is set."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})


def serve_rows(exam: Exam, rows: Sequence[Row], directory: Path) -> Iterator[tuple[Row, Outcome]]:
    """The rows' outcomes in order; a row whose answers are all in the directory needs no server.

    Raises:
        ValueError: a server that does not start, or a directory with answers of other settings.
    """
    offline()
    with ExitStack() as servers:
        running: tuple[str, ...] = ()
        url = ""
        for number, row in enumerate(rows, start=1):
            place, arm = directory / row.name / row.key(), row.arm
            known = finished(exam, place)
            if known is None and arm.serve != running:
                servers.close()  # one server at a time
                url, running = servers.enter_context(local_server(arm.serve, on_wait=lambda: None)), arm.serve
            yield row, known or _take(exam, Endpoint(url, xargs=arm.xargs), place, f"{number}/{len(rows)} {row.name}")


def _take(exam: Exam, endpoint: Endpoint, place: Path, title: str) -> Outcome:
    with tqdm(total=len(exam.samples), desc=title, mininterval=5) as bar:
        return take(exam, endpoint, place, lambda number: _advance(bar, number), lambda: _advance(bar, 1))


def _advance(bar: "tqdm[Any]", number: int) -> None:
    bar.update(number)


def finished(exam: Exam, place: Path) -> Outcome | None:
    """The outcome of answers that are all there, whatever server gave them; None when some are missing."""
    if not (place / FILE).exists():
        return None
    _, first = next(read_json_lines(place / FILE, ("settings",)))
    settings = has_fields(first["settings"], ("task", "seed"), str(place / FILE))
    if (settings["task"], settings["seed"]) != (exam.name, exam.source.seed):
        raise ValueError(f"{place} holds answers of task {settings['task']}, seed {settings['seed']}; take another one")
    with Journal(place, settings) as journal:
        if journal.missing(list(exam.samples)):
            return None
        answers = {sample.id: journal.answers[sample.id] for sample in exam.samples}
    return Outcome(answers, score_all(exam.task, exam.samples, answers))


def figures_of(exam: Exam, row: Row, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """One row's figures: its own, against its reference, and an ablation's against HiDrop's row."""
    seed, outcome = exam.source.seed, outcomes[row.name]
    result = described(row) | summarise(exam.task, outcome.scored, outcome.answers, seed)
    against = compare(outcomes[row.reference].scored, outcome.scored, seed)
    result |= _retained(against)
    for kind, figures in against["by_type"].items():
        result["by_type"][kind] |= _retained(figures)
    if row.group is Group.ABLATION and MAIN_ABLATION in outcomes:
        result["against_hidrop"] = difference(outcomes[MAIN_ABLATION].scored, outcome.scored, seed)
    return result


def _retained(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"retention": figures["retention"], "retention_interval": figures["intervals"]["retention"]}


def difference(before: Sequence[Scored], after: Sequence[Scored], seed: int) -> dict[str, Any]:
    """Accuracy of ``after`` less that of ``before`` on the same questions, with its paired interval."""
    scores = [one.score - other.score for one, other in zip(after, before, strict=True)]
    return {"difference": sum(scores) / len(scores), "interval": mean_interval(scores, seed)}
