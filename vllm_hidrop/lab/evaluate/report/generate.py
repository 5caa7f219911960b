"""From rows to the three files: figures as JSON first, then text and plot from that file."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_hidrop.lab.evaluate.exam import Exam, provenance
from vllm_hidrop.lab.evaluate.reading import read_json
from vllm_hidrop.lab.evaluate.report.document import document, draw
from vllm_hidrop.lab.evaluate.report.rows import FLAGS, LATE, Group, Row, all_rows, choose
from vllm_hidrop.lab.evaluate.report.selection import COMPARED, measure
from vllm_hidrop.lab.evaluate.report.serving import PRECISIONS, agreements, figures_of, serve_rows
from vllm_hidrop.lab.evaluate.samples import Source
from vllm_hidrop.lab.train.schedules import SHAPE

TASK = "synthetic"
NAME = "accuracy"


def load_exam(limit: int, seed: int, concurrency: int) -> Exam:
    """The questions; ValueError when there are none."""
    return Exam.load(TASK, Source(limit=limit, seed=seed), concurrency)


def run(
    exam: Exam, out: Path, ablations: Path | None, only: Sequence[str], asks_training_code: bool, docs: Path
) -> None:
    """Ask every row, keep the answers in ``out``, and write the figures' JSON file.

    Raises ValueError: an unknown row, a server that does not start, or answers of other settings in the directory.
    """
    rows, left_out = servable(choose(all_rows(ablations), only))
    outcomes = serve_rows(exam, rows, out)
    result = {
        "task": TASK,
        "questions": len(exam.samples),
        "limit": exam.source.limit,
        "seed": exam.source.seed,
        "concurrency": exam.concurrency,
        "precision": PRECISIONS[Group.SHIPPED],
        "flags": " ".join(FLAGS),
        "num_layers": SHAPE.num_layers,
        "late_layer": LATE[0],
        "machine": machine(),
        **provenance(),
        "rows": [figures_of(exam, row, outcomes) for row in rows],
        "left_out": left_out,
        "agreement": agreements(exam, rows, outcomes, out) if asks_training_code else [],
        "selection": _selection(exam) if outcomes.keys() >= COMPARED else None,
    }
    docs.mkdir(parents=True, exist_ok=True)
    _keep(docs, result)


def measure_selection(exam: Exam, docs: Path) -> None:
    """Add how far bfloat16 moves the kept patches to the JSON file; ValueError: no such file, or no server starts."""
    result = read_json(docs / f"{NAME}.json", dict[str, Any])
    _keep(docs, result | {"selection": _selection(exam)})


def _selection(exam: Exam) -> dict[str, Any]:
    about = {"limit": exam.source.limit, "seed": exam.source.seed, "machine": machine(), **provenance()}
    return about | measure(exam)


def _keep(docs: Path, result: dict[str, Any]) -> None:
    (docs / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def servable(rows: Sequence[Row]) -> tuple[list[Row], list[dict[str, str]]]:
    """Rows whose schedule can be served, then name and reason of each of the others."""
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
    """Write text and figure from the JSON file; ValueError: no such file."""
    result = read_json(docs / f"{NAME}.json", dict[str, Any])
    (docs / f"{NAME}.md").write_text(document(result), encoding="utf-8")
    draw(result, docs / f"{NAME}.png")


def machine() -> str:
    """Processor and cores, without the machine's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, no GPU"
