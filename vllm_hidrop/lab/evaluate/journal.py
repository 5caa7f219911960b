"""Answers on disk, so that a run that was cut off goes on where it ended.

A JSON-lines file: the settings in its first line, then an answer per line with the sample's id and the settings' hash.
A failed answer is recorded too, and asked again by the next run.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pydantic import BaseModel

from vllm_hidrop.lab.evaluate.endpoint import Answer
from vllm_hidrop.lab.evaluate.reading import parse_json, read_text
from vllm_hidrop.lab.evaluate.samples import Sample
from vllm_hidrop.outputs import check_file

FILE = "answers.jsonl"


class _Header(BaseModel):
    settings: dict[str, Any]


class _Line(BaseModel):
    settings: str
    id: str
    asked: str
    text: str | None
    vision_tokens: float | None
    error: str | None


def check_journal(directory: Path) -> None:
    """OSError where a run cannot keep its answers in the directory."""
    check_file(directory / FILE)


def read_settings(directory: Path) -> dict[str, Any] | None:
    """The settings of a journal; None where there is none."""
    path = directory / FILE
    return parse_json(_Header, read_text(path).partition("\n")[0], path, 1).settings if path.exists() else None


class Journal:
    """The answers of one run; without a directory they are only held in memory.

    Raises ValueError: the file holds answers under other settings or to other questions, or is no such file.
    """

    def __init__(self, directory: Path | None, settings: Mapping[str, Any]) -> None:
        self.answers: dict[str, Answer] = {}
        self._asked: dict[str, str] = {}
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._hash = digest(self._settings)
        self._path = directory / FILE if directory else None
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._read(self._path)
            self._file = self._path.open("a", encoding="utf-8")
            if self._path.stat().st_size == 0:
                self._write(_Header(settings=self._settings))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def missing(self, samples: Sequence[Sample]) -> list[Sample]:
        """Samples without an answer or with a failed one; ValueError: a question or expected answer has changed."""
        for sample in samples:
            if self._asked.get(sample.id, _fingerprint(sample)) != _fingerprint(sample):
                raise ValueError(
                    f"{self._path}: the data changed since sample {sample.id} was asked; take another --out"
                )
        return [sample for sample in samples if sample.id not in self.answers or self.answers[sample.id].error]

    def add(self, sample: Sample, answer: Answer) -> None:
        """Keep an answer; where there is a file, it is written before this returns."""
        self.answers[sample.id] = answer
        self._asked[sample.id] = asked = _fingerprint(sample)
        said = dataclasses.asdict(dataclasses.replace(answer, report=None))
        self._write(_Line.model_validate({"settings": self._hash, "asked": asked, **said}))

    def _write(self, line: BaseModel) -> None:
        if self._file is not None:
            self._file.write(line.model_dump_json() + "\n")
            self._file.flush()

    def _read(self, path: Path) -> None:
        text = read_text(path) if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the run was killed while it wrote its last line
            path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.split("\n")[:-1], start=1):
            if number == 1:
                self._check_settings(parse_json(_Header, line, path, 1).settings)
            else:
                self._take(parse_json(_Line, line, path, number), number)

    def _check_settings(self, found: Mapping[str, Any]) -> None:
        changed = [
            f"{name} was {json.dumps(found.get(name))}, is {json.dumps(self._settings.get(name))}"
            for name in sorted(found.keys() | self._settings.keys())
            if found.get(name) != self._settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self._path} holds answers under other settings: {'; '.join(changed)}; take another --out"
            )

    def _take(self, line: _Line, number: int) -> None:
        if line.settings != self._hash:
            raise ValueError(f"{self._path}, line {number}: expected settings {self._hash}, got {line.settings}")
        self.answers[line.id] = Answer(line.id, line.text, line.vision_tokens, line.error)
        self._asked[line.id] = line.asked


def digest(value: Any) -> str:
    """A short hash of plain JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(sample: Sample) -> str:
    return digest([sample.question, sample.expected])
