"""Rows, goals, tables and inputs of the benchmark, without an engine."""

import base64
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.progress import Progress
from typer.testing import CliRunner

from vllm_hidrop.bench.goals import goal_of, verdict
from vllm_hidrop.bench.rows import SECTIONS, make_row, ratio, read_rows
from vllm_hidrop.bench.servers import Load, contents
from vllm_hidrop.bench.shapes import SHAPES
from vllm_hidrop.bench.tables import cells, markdown, markdown_sections
from vllm_hidrop.cli import bench_all
from vllm_hidrop.cli import bench_engines as engines
from vllm_hidrop.cli.app import app
from vllm_hidrop.cli.bench import TOK48, Bench, complete_choice, finished

DOCUMENTED = Path(__file__).parents[2] / "docs" / "bench.json"


def row(name: str, stock: float, ours: float, unit: str, ideal: float | None = None, **more: Any) -> dict[str, Any]:
    return {"shape": "bench"} | make_row("serve", name, (stock, ours), unit, ideal, command="", **more)


@pytest.mark.parametrize(("unit", "better"), [("ms", 2.0), ("s", 2.0), ("MiB", 2.0), ("requests/s", 0.5)])
def test_a_ratio_above_one_says_that_ours_is_better(unit: str, better: float) -> None:
    assert ratio(ours=1, stock=2, unit=unit) == better


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (row("prefill hidrop, 1 image + 64 text", 4.5, 1, "ms", 5.0), "reached"),
        (row("prefill hidrop, 8 images + 64 text", 4.4, 1, "ms", 5.0), "missed"),
        (row("prefill hidrop, 1 image + 64 text, eager", 4.4, 1, "ms", 5.0), ""),
        (row("prefill hidrop, 4 images + 64 text", 4.4, 1, "ms", 5.0), ""),
        (row("serve hidrop, requests/s", 1, 3.0, "requests/s"), "reached"),
        (row("serve hidrop, requests/s", 1, 2.9, "requests/s"), "missed"),
        (row("serve hidrop, ITL p50 at 8", 10, 10.1, "ms"), "missed"),
        (row("serve hidrop off, requests/s", 1, 0.99, "requests/s"), "reached"),
        (row("serve hidrop off, TTFT p50 at 8", 1, 1.03, "ms"), "missed"),
        (row("decode hidrop text only, batch 1", 1.03, 1, "ms"), "above"),
        (row("kv hidrop, requests held", 8, 32, "requests"), "reached"),
        (row("kv hidrop, bytes held, 1 image + 64 text", 4, 1, "MiB", over_token_exact=1.1), "reached"),
        (row("kv hidrop, bytes held, 1 image + 64 text", 4, 1, "MiB", over_token_exact=1.2), "missed"),
        (
            row("kv hidrop, bytes held, 1 image", 4, 1, "MiB", over_token_exact=1.1, kv_blocks=2, kv_blocks_planned=1),
            "missed",
        ),
        (row("engine start", 10, 12.0, "s"), "reached"),
        (row("engine start", 10, 12.1, "s"), "missed"),
        (row("serve visipruner, requests/s", 1, 1, "requests/s"), ""),
    ],
)
def test_a_goal_is_reached_or_missed_by_its_figure(measured: dict[str, Any], expected: str) -> None:
    assert verdict(measured) == expected
    assert verdict(measured | {"shape": "tiny"}) == ""


def test_medians_of_pairs_count() -> None:
    pairs = [[row("engine start", stock, 1.0, "s")] for stock in (1.0, 9.0, 2.0)]
    (merged,) = finished(Bench("tiny", 1, 3, True, TOK48), pairs)
    assert (merged["stock"], merged["ratio"], merged["pair_ratios"]) == (2.0, 2.0, [1.0, 9.0, 2.0])
    assert merged["shape"] == "tiny"
    assert "pairs 1.00x..9.00x" in cells(merged)[-1]


def test_a_command_names_what_differs_from_the_usual() -> None:
    choice = complete_choice("hidrop", "tok64", {"scale": False})
    command = Bench("tiny", 3, 2, False, choice).command("burst", requests=4)
    assert command == (
        "hidrop bench burst --requests 4 --shape tiny --runs 3 --pairs 2 --preset tok64 "
        """--options '{"scale": false}' --eager"""
    )


def test_bench_all_measures_every_section_and_each_adaptive_method_in_both_modes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, Bench]] = []

    def stand_in(section: str) -> Callable[..., list[dict[str, Any]]]:
        def measure(bench: Bench, *_: object) -> list[dict[str, Any]]:
            asked.append((section, bench))
            return [{"section": section}]

        return measure

    for section in SECTIONS:
        where = bench_all if section == "serve" else engines
        monkeypatch.setattr(where, section, stand_in(section))
    with Progress(disable=True) as progress:
        found = list(bench_all.measure_all(Bench("bench", 15, 1, True, TOK48), progress))
    assert {each["section"] for each in found} == SECTIONS.keys()
    adaptive = {(b.shape, b.method, b.compiled) for _, b in asked if b.method in ("visipruner", "mustdrop")}
    assert len(adaptive) == 6
    assert {b.runs for section, b in asked if section == "serve"} == {1}


def test_the_documented_rows_have_what_tables_need_and_nothing_twice() -> None:
    rows = read_rows(DOCUMENTED)
    names = [each["name"] for each in rows]
    assert len(set(names)) == len(names)
    for each in rows:
        assert each["section"] in SECTIONS
        assert each["shape"] in SHAPES
        assert each["ratio"] == pytest.approx(ratio(each["ours"], each["stock"], each["unit"]))
        assert {"command", "versions", "cpu", "date", "ideal_ratio"} <= each.keys()
        assert each["command"].startswith(f"hidrop bench {each['section']} ")
        goal = goal_of(each)
        assert cells(each)[6] == (f"{goal.text}: {verdict(each)}" if goal else "")
    text = markdown_sections(rows)
    assert all(f"| {name} |" in text for name in names)
    assert len(markdown(rows).splitlines()) == len(rows) + 2


def test_a_load_has_another_picture_in_every_request_and_the_text_behind_it() -> None:
    load = Load(requests=3, concurrency=None, images=2, text=64, output_tokens=4, seed=5)
    pictures = []
    for parts_of_message in contents(load):
        *images, text = parts_of_message
        assert [part["type"] for part in parts_of_message] == ["image_url", "image_url", "text"]
        assert len(text["text"].split()) == 63  # the template says the first
        assert re.fullmatch(r"(t\d+ ?)+", text["text"])
        pictures += [image["image_url"]["url"] for image in images]
    assert len(set(pictures)) == 6
    opened = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
    assert opened.size == (336, 336)
    assert contents(load) == contents(load)


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner().invoke(app, ["bench", "start", "--shape", "tiny", "--png", str(tmp_path / "x.png")])
    assert done.exit_code == 2
    assert "--png needs matplotlib" in done.stderr
