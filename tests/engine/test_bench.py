"""``hidrop bench`` on a tiny model: two real engines, one run, what it measures and writes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_hidrop.cli import app

pytestmark = pytest.mark.engine


def test_bench_prefill_pairs_both_engines_and_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found_file = tmp_path / "found.json"
    arguments = ["bench", "prefill", "--shape", "tiny", "--runs", "2", "--images", "2", "--json", str(found_file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(found_file.read_text())
    assert found["speedup"] == pytest.approx(found["stock_seconds"] / found["staged_seconds"])
    assert found["ideal_speedup"] > 1
    assert found["kv_blocks"] == found["kv_blocks_planned"]
    assert found["kv_bytes"] < found["kv_bytes_stock"] / 2
    assert found["versions"]["vllm"] == "0.32.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "unknown shape 'huge'; known: tiny, bench"),
        (["--shape", "tiny", "--method", "slow"], "unknown pruning method 'slow'"),
    ],
)
def test_a_bench_that_cannot_run_says_so_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["bench", "prefill", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
