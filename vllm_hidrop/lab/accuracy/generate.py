"""From rows to the three files: figures as JSON first, then text and plot from that file."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_hidrop.lab.accuracy.agreement import PRECISIONS, agreements
from vllm_hidrop.lab.accuracy.document import document
from vllm_hidrop.lab.accuracy.figure import draw
from vllm_hidrop.lab.accuracy.rows import FLAGS, LATE_LAYER, Group, Row, all_rows, choose
from vllm_hidrop.lab.accuracy.selection import COMPARED, measure
from vllm_hidrop.lab.accuracy.served import figures_of, serve_rows
from vllm_hidrop.lab.evaluate.reading import read_json
from vllm_hidrop.lab.evaluate.run import Exam, Outcome, provenance
from vllm_hidrop.lab.evaluate.samples import Source
from vllm_hidrop.lab.train.schedules import SHAPE

TASK = "synthetic"
NAME = "accuracy"


@dataclass(frozen=True)
class Questions:
    """Which, and how many are asked at once."""

    limit: int
    seed: int
    concurrency: int

    def exam(self) -> Exam:
        """The questions; ``ValueError`` when there are none."""
        return Exam.load(TASK, Source(limit=self.limit, seed=self.seed), self.concurrency)


@dataclass(frozen=True)
class Choice(Questions):
    """The questions, and the directory that keeps the answers."""

    out: Path


def run(choice: Choice, ablations: Path | None, only: Sequence[str], asks_training_code: bool, docs: Path) -> None:
    """Ask every row and write the figures' JSON file.

    Raises:
        ValueError: an unknown row, a server that does not start, or answers of other settings in the directory.
    """
    rows, left_out = servable(choose(all_rows(ablations), only))
    exam = choice.exam()
    outcomes: dict[str, Outcome] = {}
    for row, outcome in serve_rows(exam, rows, choice.out):
        outcomes[row.name] = outcome
        accuracy = sum(one.score for one in outcome.scored) / len(outcome.scored)
        print(f"{row.name}: accuracy {accuracy:.4f}, {len(outcome.failures)} failed", flush=True)
    result = {
        "task": TASK,
        "questions": len(exam.samples),
        "limit": choice.limit,
        "seed": choice.seed,
        "concurrency": choice.concurrency,
        "precision": PRECISIONS[Group.SHIPPED],
        "flags": " ".join(FLAGS),
        "num_layers": SHAPE.num_layers,
        "late_layer": LATE_LAYER,
        "machine": machine(),
        **provenance(),
        "rows": [figures_of(exam, row, outcomes) for row in rows],
        "left_out": left_out,
        "agreement": agreements(exam, rows, outcomes, choice.out) if asks_training_code else [],
        "selection": _selection(choice) if outcomes.keys() >= COMPARED else None,
    }
    docs.mkdir(parents=True, exist_ok=True)
    _keep(docs, result)


def measure_selection(questions: Questions, docs: Path) -> None:
    """Measure how far bfloat16 moves the kept patches, and put that into the figures' JSON file.

    Raises:
        ValueError: no such file, or a server that does not start.
    """
    result: dict[str, Any] = read_json(docs / f"{NAME}.json")
    _keep(docs, result | {"selection": _selection(questions)})


def _selection(questions: Questions) -> dict[str, Any]:
    about = {"limit": questions.limit, "seed": questions.seed, "machine": machine(), **provenance()}
    return about | measure(questions.exam())


def _keep(docs: Path, result: dict[str, Any]) -> None:
    (docs / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def servable(rows: Sequence[Row]) -> tuple[list[Row], list[dict[str, str]]]:
    """Rows that can be served, and names and reasons of the others."""
    good: list[Row] = []
    left_out = []
    for row in rows:
        try:
            row.resolved()
        except ValueError as error:
            left_out.append({"name": row.name, "reason": " ".join(str(error).split())})
        else:
            good.append(row)
    return good, left_out


def write(docs: Path) -> None:
    """Text and figure from the JSON file.

    Raises:
        ValueError: no such file.
    """
    result: dict[str, Any] = read_json(docs / f"{NAME}.json")
    (docs / f"{NAME}.md").write_text(document(result), encoding="utf-8")
    draw(result, docs / f"{NAME}.png")


def machine() -> str:
    """Processor and cores, without the machine's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, no GPU"
