"""`hidrop monitor` against a running server, with a real Prometheus of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.server.harness import Server

COMMAND = (sys.executable, "-c", "from vllm_hidrop.cli.app import app; app()", "monitor")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.server
def test_it_draws_what_the_traffic_moved(server: Server, tmp_path: Path) -> None:
    answered = server.metric("vllm_hidrop_requests_total")
    done = run("--url", server.url, "--seconds", "8", "--clients", "2", "--png", str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    told = re.search(r"(\d+) requests answered, (\d+) refused; (\d+) queries, (\d+) without data", done.stdout)
    assert told, done.stdout
    assert int(told[1]) == server.metric("vllm_hidrop_requests_total") - answered > 0
    assert int(told[4]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run("--url", "http://127.0.0.1:9", "--png", str(tmp_path / "a.png"))
    assert done.returncode == 2
    assert "no model at http://127.0.0.1:9" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
