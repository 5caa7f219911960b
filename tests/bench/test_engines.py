"""``hidrop bench`` on a tiny model: two real engines in one run, what each section measures and writes."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_hidrop.bench.goals import goal_of
from vllm_hidrop.bench.rows import HIGHER_IS_BETTER
from vllm_hidrop.cli.app import app

KEYS = {"name", "ours", "stock", "ratio", "ideal_ratio", "unit", "command", "versions"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny checkpoint is made, once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder; the checkpoint is elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # nothing is timed here: do not spin on shared cores
    return tmp_path


def rows(folder: Path, section: str, *arguments: str) -> list[dict[str, Any]]:
    """Run a section on the tiny shape; every row has the keys, and a command that the command line knows."""
    file = folder / "rows.json"
    done = CliRunner().invoke(
        app, ["bench", section, "--shape", "tiny", "--eager", "--json", str(file), *arguments], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(file.read_text())
    for row in found:
        assert row.keys() >= KEYS
        assert row["versions"]["vllm"] == "0.32.0"
        better = row["ours"] / row["stock"] if row["unit"] in HIGHER_IS_BETTER else row["stock"] / row["ours"]
        assert row["ratio"] == pytest.approx(better)
        program, *words = shlex.split(row["command"])
        assert (program, *words[:2]) == ("hidrop", "bench", section)
        assert "--eager" in words
        parsed = CliRunner().invoke(app, [*words, "--help"])
        assert parsed.exit_code == 0, row["command"]
    return found


def has_goal(row: dict[str, Any]) -> bool:
    """Whether the same row, measured as vLLM runs on a shape with goals, has one."""
    return goal_of(row | {"shape": "bench", "name": row["name"].removesuffix(", eager")}) is not None


@pytest.mark.engine
def test_prefill_pairs_both_engines_in_every_kind_of_traffic_and_draws_them(folder: Path) -> None:
    png = folder / "rows.png"
    traffic = "image,off,text"
    found = rows(folder, "prefill", "--runs", "1", "--images", "2", "--traffic", traffic, "--png", str(png))
    assert [row["name"] for row in found] == [
        "prefill hidrop, 2 images + 64 text, eager",
        "prefill hidrop off, 2 images + 64 text, eager",
        "prefill hidrop text only, 64 text, eager",
    ]
    pruned, off, text = found
    assert pruned["ideal_ratio"] > 2
    assert pruned["kept"][1] == 2 * 576
    assert pruned["kv_blocks"] == pruned["kv_blocks_planned"]
    assert off["ideal_ratio"] == text["ideal_ratio"] == 1
    assert [has_goal(row) for row in found] == [False, True, True]
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.engine
def test_decode_steps_have_all_requests_of_the_batch(folder: Path) -> None:
    found = rows(folder, "decode", "--runs", "1", "--batch", "1,3", "--traffic", "image,text", "--pairs", "1")
    assert [row["name"].split(", ")[:2] for row in found] == [
        ["decode hidrop", "batch 1"],
        ["decode hidrop", "batch 3"],
        ["decode hidrop text only", "batch 1"],
        ["decode hidrop text only", "batch 3"],
    ]
    one, three, *text = found
    assert 1 < one["ideal_ratio"] < three["ideal_ratio"]  # the more requests, the less the weights count
    assert [row["ideal_ratio"] for row in text] == [1, 1]


@pytest.mark.engine
def test_kv_counts_blocks_and_fills_one_pool_in_both(folder: Path) -> None:
    one, two, held = rows(folder, "kv", "--images", "1,2", "--pool", "3")
    for row in (one, two):
        assert row["kv_blocks"] == row["kv_blocks_planned"]
        assert row["ratio"] < row["ideal_ratio"]  # blocks have unused ends, token-exact ones have not
        assert 1 < row["over_token_exact"] < 1.15
    assert held["stock"] == 3
    assert has_goal(one)
    assert has_goal(held)
    assert 3 * 3 < held["ours"] <= 3 * held["ideal_ratio"]


@pytest.mark.engine
def test_burst_takes_as_many_steps_as_the_budget_asks(folder: Path) -> None:
    (found,) = rows(folder, "burst", "--requests", "7", "--budget", "2048", "--runs", "1")
    stock_steps, our_steps = found["steps"]
    assert stock_steps == 3  # 2048 tokens, and so many of the encoder, are three images in a step
    assert our_steps < stock_steps


@pytest.mark.engine
def test_prefix_asks_twice_about_one_picture(folder: Path) -> None:
    first, second = rows(folder, "prefix", "--runs", "1")
    assert first["name"].endswith("first question, eager")
    assert second["name"].endswith("second question, eager")
    assert second["stock"] < first["stock"]
    assert second["ideal_ratio"] is None


@pytest.mark.engine
def test_start_is_measured_from_new_processes(folder: Path) -> None:
    (found,) = rows(folder, "start", "--runs", "1")
    assert found["unit"] == "s"
    assert has_goal(found)
    assert 1 < found["stock"] < 300
    assert 1 < found["ours"] < 300


@pytest.mark.server
@pytest.mark.timeout(600)  # two servers start one after the other
def test_serve_loads_both_servers_by_vllms_own_benchmark(folder: Path) -> None:
    found = rows(folder, "serve", "--requests", "3", "--output-tokens", "3")
    assert [row["unit"] for row in found] == ["requests/s", "ms", "ms", "ms"] * 3
    assert found[0]["name"] == "serve hidrop, requests/s, eager"
    assert found[5]["name"] == "serve hidrop off, TTFT p50 at 8, eager"
    assert all(row["ours"] > 0 and row["stock"] > 0 for row in found)
    assert [has_goal(row) for row in found] == [True, False, False, True, *[True] * 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefill", "--shape", "huge"], "unknown shape 'huge'; known: tiny, bench"),
        (["prefill", "--shape", "tiny", "--method", "slow"], "unknown pruning method 'slow'"),
        (["prefill", "--images", "1,x"], "--images must be whole numbers from 1 to 16"),
        (["prefill", "--images", "17"], "--images must be whole numbers from 1 to 16"),
        (["prefill", "--text", "1"], "--text must be whole numbers from 2 to 8192"),
        (["decode", "--traffic", "video"], "--traffic: unknown 'video'; known: image, off, text"),
        (["decode", "--batch", "0"], "--batch must be whole numbers from 1 to 256"),
        (["kv", "--images", "4", "--pool", "2", "--shape", "tiny"], "does not fit a pool for 2 requests"),
        (["burst", "--budget", "64", "--shape", "tiny"], "--budget 64 is less than"),
        (["serve", "--options", "[]"], "--options must be a JSON object"),
    ],
)
def test_a_bench_that_cannot_run_says_so_in_one_line(arguments: list[str], message: str, folder: Path) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output
