"""``hidrop demo``: the same questions with and without pruning, side by side.

Times run from sending a request to its first token. Every request names its image anew, so that no cache of vLLM's
spares the second request the vision tower.
"""

import base64
import dataclasses
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vllm_hidrop.cli.local_server import asked_server
from vllm_hidrop.json_text import read_short_text
from vllm_hidrop.outputs import write_file
from vllm_hidrop.terminal import Terminal

QUESTIONS = "questions.jsonl"
MAX_ANSWER_TOKENS = 16
REQUEST_SECONDS = 120.0


@dataclass(frozen=True)
class Question:
    """One line of ``questions.jsonl``; ``image`` is the file's content."""

    image: bytes
    question: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """What one request gave; ``report`` is the server's ``hidrop`` object, ``error`` says why there is no answer."""

    text: str = ""
    seconds_to_first_token: float = 0.0
    report: dict[str, Any] | None = None
    error: str | None = None

    def is_right(self, expected: str) -> bool:
        """Whether the answer is the expected one, spaces aside."""
        return self.error is None and self.text.split() == expected.split()


@dataclass(frozen=True)
class Row:
    """One question answered twice."""

    question: Question
    dense: Answer
    pruned: Answer


def run(examples: Path | None, url: str | None, json_file: Path | None) -> int:
    """Ask, show, write; returns 1 if a request failed, else 0. Raises ValueError: no questions, or no server."""
    questions = read_questions(examples or find_examples())
    console = Terminal()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress, asked_server(url, progress) as address:
        rows = list(_ask_all(address, questions, progress))
    failed = [answer.error for row in rows for answer in (row.dense, row.pruned) if answer.error]
    try:
        console.show(_table(rows))
        if failed:
            console.print(f"{len(failed)} of {2 * len(rows)} requests failed: {failed[0]}", style="red", markup=False)
    finally:  # a reader that left does not cost the file
        if json_file is not None:
            write_file(json_file, json.dumps([_as_json(row) for row in rows], indent=2) + "\n")
    return 1 if failed else 0


def find_examples() -> Path:
    """Folder of the questions: this repository's, else the working directory's. Raises ValueError: there is none."""
    places = (Path(__file__).parents[2] / "examples", Path.cwd() / "examples", Path.cwd())
    for place in places:
        if (place / QUESTIONS).is_file():
            return place
    raise ValueError(f"no {QUESTIONS} found; name its folder with --examples")


def read_questions(folder: Path) -> list[Question]:
    """Read questions and images. Raises ValueError: no file, no question, or a bad line; OSError: no image."""
    file = folder / QUESTIONS
    try:
        lines = read_short_text(file).split("\n")
        questions = [_question(folder, json.loads(line)) for line in lines if line.strip()]
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: lines must be objects with texts image, question, answer: {error}") from None
    if not questions:
        raise ValueError(f"{file}: no questions")
    return questions


def _question(folder: Path, entry: Any) -> Question:
    image, question, answer = (entry[key] for key in ("image", "question", "answer"))
    if not all(isinstance(text, str) for text in (image, question, answer)):
        raise TypeError(f"got {entry}")
    return Question((folder / image).read_bytes(), question, answer)


def ask(url: str, model: str, question: Question, pruned: bool) -> Answer:
    """Send one streamed request and read its answer."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body(model, question, pruned)).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        return _read_stream(request)
    except urllib.error.HTTPError as error:
        return Answer(error=f"HTTP {error.code}: {error.read().decode(errors='replace')}")
    except (OSError, HTTPException, LookupError, TypeError, ValueError) as error:
        return Answer(error=str(error) or type(error).__name__)


def _read_stream(request: urllib.request.Request) -> Answer:
    started = time.perf_counter()
    first_token: float | None = None
    text, report = "", None
    with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if not data or data == b"[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            first_token = first_token or time.perf_counter()
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            report = chunk.get("hidrop", report)
    if first_token is None:
        raise ValueError("the server sent no token")
    return Answer(text.strip(), first_token - started, report)


def body(model: str, question: Question, pruned: bool) -> dict[str, Any]:
    """The body of a streamed chat request: the image, then the question."""
    image = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(question.image).decode()},
        "uuid": uuid.uuid4().hex,
    }
    return {
        "model": model,
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": question.question}]}],
        "max_tokens": MAX_ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "vllm_xargs": {"hidrop": "on" if pruned else "off"},
    }


def _ask_all(url: str, questions: list[Question], progress: Progress) -> Iterator[Row]:
    model = model_name(url)
    for pruned in (False, True):  # what a first request sets up is not to be in the times
        ask(url, model, questions[0], pruned)
    task = progress.add_task("asking", total=2 * len(questions))
    for question in questions:
        answers = []
        for pruned in (False, True):
            answers.append(ask(url, model, question, pruned))
            progress.advance(task)
        yield Row(question, *answers)


def model_name(url: str) -> str:
    """Name of the model that a server serves. Raises ValueError: none, or the server is not one of ours."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=REQUEST_SECONDS) as response:
            card = json.load(response)["data"][0]
            name, is_ours = str(card["id"]), "hidrop" in card
    except (OSError, HTTPException, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"no model at {url}: {error}") from None
    if not is_ours:
        raise ValueError(f"{url} is not a hidrop server")
    return name


def _table(rows: list[Row]) -> Table:
    headings = ("Question", "Expected", "Dense", "Pruned", "Kept per stage", "KV blocks", "First token, s")
    table = Table(*headings, title="Every question with all vision tokens (dense) and pruned", show_footer=True)
    for row in rows:
        question, expected = row.question.question, row.question.answer
        answers = (_marked(answer, expected) for answer in (row.dense, row.pruned))
        cells = (Text(question), Text(expected), *answers, Text(_kept(row.pruned)))
        table.add_row(*cells, _blocks([row]), _seconds([row]))
    footers = (
        f"{len(rows)} questions",
        "",
        *(f"{sum(a.is_right(r.question.answer) for r, a in pairs)} right" for pairs in _by_mode(rows)),
        "",
        _blocks(rows),
        _seconds(rows),
    )
    for column, footer in zip(table.columns, footers, strict=True):
        column.footer = footer
    table.caption = "KV blocks and seconds: pruned / dense"
    return table


def _by_mode(rows: list[Row]) -> tuple[list[tuple[Row, Answer]], list[tuple[Row, Answer]]]:
    return [(row, row.dense) for row in rows], [(row, row.pruned) for row in rows]


def _marked(answer: Answer, expected: str) -> Text:
    if answer.error:
        return Text("failed", style="red")
    return Text(answer.text, style="green" if answer.is_right(expected) else "yellow")


def _kept(answer: Answer) -> str:
    return " > ".join(str(stage["kept"]) for stage in answer.report["stages"]) if answer.report else "-"


def _blocks(rows: list[Row]) -> str:
    reports = [(row.pruned.report, row.dense.report) for row in rows]
    known = [(pruned["kv_blocks"], dense["kv_blocks"]) for pruned, dense in reports if pruned and dense]
    return f"{sum(p for p, _ in known)} / {sum(d for _, d in known)}" if known else "-"


def _seconds(rows: list[Row]) -> str:
    good = [row for row in rows if not row.dense.error and not row.pruned.error]
    pruned, dense = (sum(answer.seconds_to_first_token for _, answer in pairs) for pairs in _by_mode(good))
    return f"{pruned:.3f} / {dense:.3f}" if good else "-"


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "question": row.question.question,
        "expected": row.question.answer,
        "dense": dataclasses.asdict(row.dense),
        "pruned": dataclasses.asdict(row.pruned),
    }
