"""Asking rows: answers that are there need no server, figures are paired, and the whole command for real."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_hidrop.lab.evaluate.endpoint import Answer
from vllm_hidrop.lab.evaluate.exam import Arm, Exam, Outcome
from vllm_hidrop.lab.evaluate.journal import Journal
from vllm_hidrop.lab.evaluate.report import serving
from vllm_hidrop.lab.evaluate.report.rows import all_rows
from vllm_hidrop.lab.evaluate.report.serving import agreement, figures_of, finished, serve_rows
from vllm_hidrop.lab.evaluate.samples import Source
from vllm_hidrop.lab.evaluate.scoring import score_all

SCRIPT = Path(__file__).parents[4] / "scripts" / "accuracy.py"
DENSE, HIDROP = all_rows(None)[:2]
SETTINGS = {"task": "synthetic", "seed": 0}


@pytest.fixture
def exam() -> Exam:
    return Exam.load("synthetic", Source(limit=4), 1)


def keep(exam: Exam, place: Path, num_wrong: int, num_answers: int = 4) -> None:
    with Journal(place, SETTINGS) as journal:
        for index, sample in enumerate(exam.samples[:num_answers]):
            journal.add(sample, Answer(sample.id, "wrong" if index < num_wrong else sample.expected[0], 64.0))


def outcome(exam: Exam, num_wrong: int) -> Outcome:
    texts = ["wrong" if index < num_wrong else sample.expected[0] for index, sample in enumerate(exam.samples)]
    answers = {one.id: Answer(one.id, text, 64.0) for one, text in zip(exam.samples, texts, strict=True)}
    return Outcome(answers, score_all(exam.task, exam.samples, answers))


def test_rows_whose_answers_are_there_start_no_server(
    tmp_path: Path, exam: Exam, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "local_server", None)
    for row, num_wrong in ((DENSE, 0), (HIDROP, 1)):
        keep(exam, tmp_path / row.name / row.key(), num_wrong)
    outcomes = serve_rows(exam, [DENSE, HIDROP], tmp_path)
    figures = figures_of(exam, HIDROP, outcomes)
    assert (figures["accuracy"], figures["retention"], figures["mean_vision_tokens"]) == (0.75, 0.75, 64.0)
    assert figures["by_type"][exam.samples[0].type]["retention"] == 0.0


def test_missing_answers_and_other_questions_are_not_taken_for_finished(tmp_path: Path, exam: Exam) -> None:
    arm = Arm("dense", directory=tmp_path)
    assert finished(exam, arm) is None
    keep(exam, tmp_path, num_wrong=0, num_answers=3)
    assert finished(exam, arm) is None
    other = replace(exam, source=Source(limit=4, seed=1))
    with pytest.raises(ValueError, match="answers of task synthetic, seed 0"):
        finished(other, arm)


def test_agreement_counts_equal_answers_and_the_accuracies_difference(exam: Exam) -> None:
    found = agreement(HIDROP, outcome(exam, 1), outcome(exam, 0), seed=0)
    assert (found["same"], found["served"], found["training_code"]) == (0.75, 0.75, 1.0)
    assert found["difference"] == -0.25
    assert found["precision"] == "bfloat16"


@pytest.mark.server
def test_two_rows_are_served_asked_and_written(tmp_path: Path) -> None:
    options = ["--limit", "8", "--only", DENSE.name, HIDROP.name, "--out", str(tmp_path), "--docs", str(tmp_path)]
    with subprocess.Popen([sys.executable, str(SCRIPT), *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            _, told = process.communicate(timeout=270)
        finally:
            process.terminate()  # which also ends its server; a kill would leave that one running
    assert process.returncode == 0, told
    result = json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))
    assert [row["mean_vision_tokens"] for row in result["rows"]] == [576.0, 64.0]
    assert [row["failed"] for row in result["rows"]] == [0, 0]
    assert all(one["same"] >= 7 / 8 for one in result["agreement"])
    assert (tmp_path / "accuracy.md").exists()
    assert str(tmp_path) not in json.dumps(result)
