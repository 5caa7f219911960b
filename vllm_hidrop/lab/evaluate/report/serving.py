"""Serves and asks the document's rows, and compares them with each other and with the training code's own forward."""

import io
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vllm_hidrop.cli.evaluate import progress_bars, show_progress
from vllm_hidrop.cli.local_server import local_server
from vllm_hidrop.lab.evaluate.endpoint import Answer
from vllm_hidrop.lab.evaluate.exam import Arm, Exam, Outcome, take_arms
from vllm_hidrop.lab.evaluate.journal import Journal, read_settings
from vllm_hidrop.lab.evaluate.report.rows import Group, Row, described
from vllm_hidrop.lab.evaluate.scoring import compare, difference, mean_score, summarise

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""What ``hidrop serve`` sets for the shipped checkpoints; here it is set for all."""
MAIN_ABLATION = "ablation/hidrop"
PRECISIONS = {Group.SHIPPED: "bfloat16", Group.FLOAT32: "float32"}
"""Data types that groups are served in; the first is the checkpoints' own."""


def server(arm: Arm) -> AbstractContextManager[str]:
    """A server for an arm, with :data:`ENVIRONMENT` where nothing else is set."""
    return local_server(arm.serve, on_wait=lambda: None, environment={**ENVIRONMENT, **os.environ})


def serve_rows(exam: Exam, rows: Sequence[Row], directory: Path) -> dict[str, Outcome]:
    """The rows' outcomes by name; rows with all answers in ``directory`` need no server. Errors as of ``take_arms``."""
    arms = [row.arm(directory / row.name / row.key()) for row in rows]
    outcomes: dict[str, Outcome] = {}
    with progress_bars() as bars:
        found = take_arms(exam, arms, server, partial(show_progress, bars, exam), partial(finished, exam))
        for row, outcome in zip(rows, found, strict=True):
            outcomes[row.name] = outcome
            told = f"{row.name}: accuracy {mean_score(outcome.scored):.4f}, {len(outcome.failures)} failed"
            bars.console.print(told, markup=False, highlight=False)
    return outcomes


def finished(exam: Exam, arm: Arm) -> Outcome | None:
    """The outcome of an arm whose answers are all there, whatever server gave them; None when some are missing."""
    settings = read_settings(arm.directory) if arm.directory else None
    if settings is None:
        return None
    if (settings.get("task"), settings.get("seed")) != (exam.name, exam.source.seed):
        held = f"task {settings.get('task')}, seed {settings.get('seed')}"
        raise ValueError(f"{arm.directory} holds answers of {held}; take another one")
    with Journal(arm.directory, settings) as journal:
        return None if journal.missing(exam.samples) else exam.outcome(journal)


def figures_of(exam: Exam, row: Row, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """One row's figures: its own, against its reference, and an ablation's against HiDrop's row too."""
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


def agreements(
    exam: Exam, rows: Sequence[Row], outcomes: Mapping[str, Outcome], directory: Path
) -> list[dict[str, Any]]:
    """Served answers against the training code's, for every row of a shipped checkpoint under its own schedule."""
    own = [row for row in rows if row.group in PRECISIONS and row.choice is None and not row.xargs]
    trained: dict[Path, Outcome] = {}
    for row in own:
        if row.checkpoint not in trained:
            trained[row.checkpoint] = training_answers(exam, row, directory)
    return [agreement(row, outcomes[row.name], trained[row.checkpoint], exam.source.seed) for row in own]


def training_answers(exam: Exam, row: Row, directory: Path) -> Outcome:
    """Answers of the training code in float32 under the checkpoint's own schedule, without vLLM; resumable."""
    from vllm_hidrop.lab.train.evaluate import Checkpoint

    place = directory / "training_code" / row.label / row.key()
    settings = {"task": exam.name, "seed": exam.source.seed, "max_tokens": exam.task.max_tokens}
    with Journal(place, settings) as journal:
        missing = journal.missing(exam.samples)
        checkpoint = Checkpoint(row.checkpoint) if missing else None
        for sample in tqdm(missing, desc=f"training code, {row.label}", mininterval=5):
            assert checkpoint is not None
            with Image.open(io.BytesIO(sample.image())) as image:
                text = checkpoint.answer(np.asarray(image.convert("RGB")), sample.question, exam.task.max_tokens)
            journal.add(sample, Answer(sample.id, text))
        return exam.outcome(journal)


def agreement(row: Row, served: Outcome, trained: Outcome, seed: int) -> dict[str, Any]:
    """The share of equal answers, and the accuracy served less that of the training code."""
    same = [served.answers[one.sample.id].text == trained.answers[one.sample.id].text for one in trained.scored]
    return {
        "checkpoint": row.label,
        "precision": PRECISIONS[row.group],
        "questions": len(same),
        "same": sum(same) / len(same),
        "served": mean_score(served.scored),
        "training_code": mean_score(trained.scored),
        **difference(trained.scored, served.scored, seed),
    }
