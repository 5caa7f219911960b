"""`hidrop eval --embedded` for real: server, questions, figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.server
COMMAND = (sys.executable, "-c", "from vllm_hidrop.cli.app import app; app()", "eval", "--embedded", "--limit", "14")


def test_the_figures_agree_with_their_types_and_with_the_answers(tmp_path: Path) -> None:
    file, out = tmp_path / "eval.json", tmp_path / "out"
    ended = subprocess.run(
        [*COMMAND, "--json", str(file), "--out", str(out)], capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(file.read_text(encoding="utf-8"))
    kinds = result["by_type"].values()
    assert sum(kind["questions"] for kind in kinds) == result["questions"] == 14
    for arm in ("dense", "hidrop"):
        right = sum(kind[arm] * kind["questions"] for kind in kinds)
        assert right / 14 == pytest.approx(result[arm])
        low, high = result["intervals"][arm]
        assert low <= result[arm] <= high
        lines = (out / arm / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        tokens = [json.loads(line)["vision_tokens"] for line in lines[1:]]
        name = "mean_vision_tokens" if arm == "hidrop" else "mean_vision_tokens_dense"
        assert sum(tokens) / len(tokens) == pytest.approx(result[name])
    assert result["retention"] == pytest.approx(result["hidrop"] / result["dense"])
    assert 0 < result["mean_vision_tokens"] < result["mean_vision_tokens_dense"]
    assert result["failed"] == {"dense": 0, "hidrop": 0}
    assert result["versions"]["vllm-hidrop"]
    assert "Retention" in ended.stdout
