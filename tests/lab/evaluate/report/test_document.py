"""Text and figure from hand-made figures, and the rows that are asked."""

import json
from pathlib import Path

import pytest

from tests.lab.evaluate.report import figures
from vllm_hidrop.lab.evaluate.figure import dodged, spaced
from vllm_hidrop.lab.evaluate.report.document import document
from vllm_hidrop.lab.evaluate.report.generate import servable, write
from vllm_hidrop.lab.evaluate.report.rows import Group, all_rows, choose, described, stages_text
from vllm_hidrop.lab.train.schedules import SHAPE
from vllm_hidrop.methods import Adaptive


def lines_with(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


# --- The document --------------------------------------------------------------------------


def test_every_row_stands_in_its_table_with_tokens_intervals_and_retention() -> None:
    text = document(figures.result())
    assert "| `fastv` | 63.6 | 31.0 | 26.0 to 36.0 | 34.4 (50.0 to 100.0) |" in text
    assert "| `flat` | 64.0 | 70.0 | 65.0 to 75.0 | 77.8 (50.0 to 100.0) | -5.0 (-7.0 to -3.0) |" in text
    assert lines_with(text, "| `dense` | 576.0 | 80.0 |")[0].split(" | ")[4] == "reference"
    assert "| all | 20 | **90.0** (85.0 to 95.0) | **85.0** (80.0 to 90.0) | 94.4 (50.0 to 100.0) |" in text


def test_the_noise_is_the_difference_between_the_two_seeds() -> None:
    result = figures.result()
    assert "differ by 1.3 points" in " ".join(document(result).split())
    result["rows"] = [row for row in result["rows"] if row["label"] != "hidrop_seed1"]
    assert "**Noise**" not in document(result)


def test_a_goal_that_was_missed_is_said_to_be_missed() -> None:
    text = document(figures.result())
    met, missed = (line for line in text.splitlines() if line.endswith(("goal met |", "goal missed |")))
    assert "float32 | 99.50 | 85.20 | 85.00 | +0.20 (-0.4 to +0.4) | goal met" in met
    assert "bfloat16 | 98.00" in missed


def test_rows_left_out_and_failed_requests_are_named() -> None:
    text = document(figures.result())
    assert "- `ablation/strange` was not asked: unknown key." in text
    assert "- `late_cut/random`: 2 requests failed and count as wrong." in text


def test_tables_without_rows_are_left_out() -> None:
    result = figures.result() | {"agreement": []}
    result["rows"] = result["rows"][:2]
    text = document(result)
    assert "## The shipped checkpoints" in text
    assert "## Ablations" not in text
    assert "## Served against" not in text


def test_text_and_figure_are_written_beside_the_json_file(tmp_path: Path) -> None:
    result = figures.result()
    result["rows"].append(figures.row("ablation", "unreported", 0.5, None))
    (tmp_path / "accuracy.json").write_text(json.dumps(result), encoding="utf-8")
    write(tmp_path)
    assert (tmp_path / "accuracy.md").read_text(encoding="utf-8") == document(result)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_labels_and_points_do_not_cover_each_other() -> None:
    heights = spaced([50.0, 51.0, 50.5, 90.0], 2.0)
    assert sorted(heights) == [heights[0], heights[2], heights[1], heights[3]]
    assert min(b - a for a, b in zip(sorted(heights), sorted(heights)[1:], strict=False)) >= 2.0
    assert dodged([64.0, 63.6, 576.0]) == pytest.approx([64.0, 67.6, 576.0])


# --- The rows ------------------------------------------------------------------------------


def test_training_free_methods_keep_hidrops_mean_number_of_tokens() -> None:
    rows = choose(all_rows(None), ["shipped", "equal_tokens"])
    chosen = [row.resolved() for row in rows if row.group is Group.EQUAL]
    fixed = [one for one in chosen if not isinstance(one.method, Adaptive)]  # the others' means are measured
    means = [one.schedule.mean_kept(SHAPE.tokens_per_image) for one in fixed]
    assert len(means) >= 5
    assert means == pytest.approx([64] * len(means), abs=1)


def test_names_are_unique_and_rows_of_one_server_stand_together() -> None:
    rows = all_rows(None)
    assert len({row.name for row in rows}) == len(rows)
    served = [row.arm().serve for row in rows]
    starts = [one for index, one in enumerate(served) if index == 0 or served[index - 1] != one]
    assert len(starts) == len(set(served))


def ablation(directory: Path, name: str, hidrop: dict[str, object] | None) -> Path:
    folder = directory / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({} if hidrop is None else {"hidrop": hidrop}), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(name.encode())
    return folder


def test_checkpoints_are_found_and_one_that_cannot_be_served_is_told(tmp_path: Path) -> None:
    ablation(tmp_path, "flat", {"method": "hidrop", "preset": "embedded"})
    ablation(tmp_path, "dense", None)
    ablation(tmp_path, "odd", {"x": 1})
    rows, left_out = servable(choose(all_rows(tmp_path), ["ablation"]))
    assert [row.name for row in rows] == ["ablation/dense", "ablation/flat"]
    assert [one["name"] for one in left_out] == ["ablation/odd"]
    assert str(tmp_path) not in json.dumps([described(row) for row in rows])


def test_a_row_needs_the_row_it_is_compared_with(tmp_path: Path) -> None:
    ablation(tmp_path, "flat", None)
    with pytest.raises(ValueError, match="ablation/flat is compared with ablation/dense"):
        choose(all_rows(tmp_path), ["ablation/flat"])
    with pytest.raises(ValueError, match="no row 'fastvv'; known: shipped/dense"):
        choose(all_rows(None), ["fastvv"])


def test_other_weights_have_another_key(tmp_path: Path) -> None:
    folder = ablation(tmp_path, "dense", None)
    (row,) = (row for row in all_rows(tmp_path) if row.group is Group.ABLATION)
    before = row.key()
    (folder / "model.safetensors").write_bytes(b"other")
    assert row.key() != before


def test_stages_are_written_as_layers() -> None:
    (row,) = (row for row in all_rows(None) if row.name == "shipped/hidrop")
    assert stages_text(row.resolved().schedule).startswith("0 in layers 0-1, 576 in layer 2, ")
    off = next(row for row in all_rows(None) if row.name == "shipped/hidrop_off")
    assert described(off)["stages"] == "every vision token in every layer"
