"""Served answers against those of the training code's own staged forward, question by question."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vllm_hidrop.lab.accuracy.rows import Group, Row
from vllm_hidrop.lab.accuracy.served import difference
from vllm_hidrop.lab.evaluate.asking import Answer
from vllm_hidrop.lab.evaluate.journal import Journal
from vllm_hidrop.lab.evaluate.run import Exam, Outcome
from vllm_hidrop.lab.evaluate.scoring import score_all

PRECISIONS = {Group.SHIPPED: "bfloat16", Group.FLOAT32: "float32"}
"""What the rows of a group are served in; the first is the checkpoints' own."""


def training_answers(exam: Exam, row: Row, directory: Path) -> Outcome:
    """What the training code answers in float32 under the checkpoint's own schedule, without vLLM; resumable."""
    from vllm_hidrop.lab.train.evaluate import Checkpoint

    place = directory / "training_code" / row.label / row.key()
    settings = {"task": exam.name, "seed": exam.source.seed, "max_tokens": exam.task.max_tokens}
    with Journal(place, settings) as journal:
        missing = journal.missing(list(exam.samples))
        checkpoint = Checkpoint(row.checkpoint) if missing else None
        for sample in tqdm(missing, desc=f"training code, {row.label}", mininterval=5):
            assert checkpoint is not None
            with Image.open(io.BytesIO(sample.image())) as image:
                text = checkpoint.answer(np.asarray(image.convert("RGB")), sample.question, exam.task.max_tokens)
            journal.add(sample, Answer(sample.id, text))
        answers = {sample.id: journal.answers[sample.id] for sample in exam.samples}
    return Outcome(answers, score_all(exam.task, exam.samples, answers))


def agreement(row: Row, served: Outcome, trained: Outcome, seed: int) -> dict[str, Any]:
    """How many answers are the same, and what that does to the accuracy (served less training code)."""
    same = [served.answers[one.sample.id].text == trained.answers[one.sample.id].text for one in trained.scored]
    accuracies = [sum(one.score for one in outcome.scored) / len(outcome.scored) for outcome in (served, trained)]
    return {
        "checkpoint": row.label,
        "precision": PRECISIONS[row.group],
        "questions": len(same),
        "same": sum(same) / len(same),
        "served": accuracies[0],
        "training_code": accuracies[1],
        **difference(trained.scored, served.scored, seed),
    }


def agreements(
    exam: Exam, rows: Sequence[Row], outcomes: Mapping[str, Outcome], directory: Path
) -> list[dict[str, Any]]:
    """One entry for every row that serves a shipped checkpoint under its own schedule."""
    own = [row for row in rows if row.group in PRECISIONS and row.choice is None and not row.xargs]
    trained: dict[Path, Outcome] = {}
    for row in own:
        if row.checkpoint not in trained:
            trained[row.checkpoint] = training_answers(exam, row, directory)
    return [agreement(row, outcomes[row.name], trained[row.checkpoint], exam.source.seed) for row in own]
