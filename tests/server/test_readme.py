"""The README's examples, run as they stand against a real server (only the port is another)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.harness import Server

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]


def example(language: str, server: Server) -> str:
    """The first block in a language, with the server's address."""
    found = re.search(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1].replace("http://127.0.0.1:8000", server.url)


def test_the_curl_example_answers_correctly(server: Server) -> None:
    done = subprocess.run(
        ["bash", "-c", example("bash", server)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"].strip() == "cyan"
    assert answer["hidrop"]["mode"] == "pruned"


def test_the_openai_example_prints_what_the_readme_shows(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-c", example("python", server)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    shown = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown is not None
    assert [line.split() for line in done.stdout.splitlines()] == [line.split() for line in shown[1].splitlines()]
