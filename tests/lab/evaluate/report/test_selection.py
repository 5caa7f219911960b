"""What bfloat16 does to the kept patches: from reports to figures, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab.evaluate.report import figures
from vllm_hidrop.lab.evaluate.report import selection
from vllm_hidrop.lab.evaluate.report.document import document
from vllm_hidrop.lab.evaluate.report.generate import load_exam, measure_selection
from vllm_hidrop.lab.evaluate.report.rows import Row
from vllm_hidrop.lab.evaluate.report.selection import Kept, kept_of, measure, moved


def report(*patches: list[int]) -> dict[str, Any]:
    return {"stages": [{"first_layer": 2 * index, "patches": [each]} for index, each in enumerate(patches)]}


def test_only_cuts_count_not_injection_nor_exit() -> None:
    found = kept_of(report([], [0, 1, 2, 3], [0, 1, 2, 3], [1, 3], [3], []), "red")
    assert found == Kept({6: frozenset({1, 3}), 8: frozenset({3})}, "red")


def test_sets_are_compared_by_cut_and_over_all_cuts() -> None:
    first = [Kept({3: frozenset({1, 2}), 4: frozenset({1})}, "a"), Kept({3: frozenset({5, 6}), 4: frozenset({5})}, "b")]
    other = [Kept({3: frozenset({1, 2}), 4: frozenset({2})}, "a"), Kept({3: frozenset({5, 7}), 4: frozenset({5})}, "c")]
    found = moved(first, other)
    assert [cut["identical"] for cut in found["cuts"]] == [0.5, 0.5]
    assert [cut["jaccard"] for cut in found["cuts"]] == pytest.approx([2 / 3, 0.5])
    assert found["jaccard"] == pytest.approx(7 / 12)
    assert (found["identical"], found["same_answers"], found["questions"]) == (0.0, 0.5, 2)


def measured(monkeypatch: pytest.MonkeyPatch, docs: Path) -> str:
    """The document after a measurement whose servers are made up."""

    def served(exam: Any, row: Row) -> list[Kept]:
        return [Kept({3: frozenset({1, 2} if row.flags else {1, 3})}, "a") for _ in exam.samples]

    monkeypatch.setattr(selection, "served_sets", served)
    (docs / "accuracy.json").write_text(json.dumps(figures.result()), encoding="utf-8")
    measure_selection(load_exam(4, 3, 1), docs)
    return document(json.loads((docs / "accuracy.json").read_text(encoding="utf-8")))


def test_the_measurement_joins_the_other_figures_with_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = measured(monkeypatch, tmp_path)
    assert "| layer 3 | 2 | 0.0 | 0.333 |  |" in text
    assert "| all cuts |  | 0.0 | 0.333 | 100.0 |" in text
    assert "`python scripts/accuracy.py --selection --limit 4 --seed 3`" in text
    assert "| `flat` | 64.0 | 70.0" in text
    assert "kept patches" not in document(figures.result())


def test_float32_is_served_before_the_shipped_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def served(_: Any, row: Row) -> list[Kept]:
        asked.append(row.name)
        return [Kept({3: frozenset({1})}, "a")]

    monkeypatch.setattr(selection, "served_sets", served)
    found = measure(load_exam(1, 0, 1))
    assert asked == ["float32/hidrop", "shipped/hidrop"] == [found["against"], found["row"]]
    assert set(asked) == selection.COMPARED
