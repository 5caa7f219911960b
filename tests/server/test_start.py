"""Choices that `hidrop serve` cannot honour end in one line and exit code 2, before anything is served."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from vllm_hidrop.embedded import MODEL_DIR

COMMAND = (sys.executable, "-c", "from vllm_hidrop.cli import app; app()")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False)


def refusal(*arguments: str) -> str:
    """The one line a refused start says."""
    ended = run("serve", *arguments)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("hidrop serve: ")]
    assert lines == ended.stderr.splitlines()[-1:], ended.stderr
    return lines[0]


class Refused(NamedTuple):
    """Arguments, and a part of the line they end with."""

    says: str
    arguments: tuple[str, ...]


BEFORE_VLLM = {
    "unknown method": Refused("known: none, hidrop", ("--method", "hydrop")),
    "unknown preset": Refused("no preset 'tok1'", ("--method", "hidrop", "--preset", "tok1")),
    "unknown key": Refused(
        "known keys: method, preset, options, positions, prefix_state_bytes, force",
        ("--hidrop-config", '{"metod": "none"}'),
    ),
    "unknown option": Refused("no option 'kept'", ("--hidrop-config", '{"method": "fastv", "options": {"kept": 0.5}}')),
    "not JSON": Refused("not JSON", ("--hidrop-config", "{method: fastv}")),
    "no such file": Refused("No such file", ("--hidrop-config", "nowhere.json")),
}


@pytest.mark.parametrize("name", BEFORE_VLLM)
def test_a_misspelt_choice_is_refused_before_vllm_is_imported(name: str) -> None:
    case = BEFORE_VLLM[name]
    assert case.says in refusal(*case.arguments)


KEEPS_THAT_RISE = '{"method": "hidrop", "preset": "embedded", "options": {"keeps": [10, 20]}}'

WITH_VLLM = {
    "another model's preset": Refused("was trained for", ("--method", "hidrop", "--preset", "tok64")),
    "keeps that rise": Refused("must not rise", ("--hidrop-config", KEEPS_THAT_RISE)),
    "a flag nobody has": Refused("--nonsense", ("--nonsense", "3")),
    "a setting pruning would break": Refused("--enable-lora", ("--enable-lora",)),
    "a launcher of vLLM's": Refused("--headless", ("--headless",)),
    "no process at all": Refused("--api-server-count", ("--api-server-count", "0")),
}


@pytest.mark.server
@pytest.mark.parametrize("name", WITH_VLLM)
def test_a_choice_that_does_not_fit_is_refused_before_the_engine_starts(name: str) -> None:
    case = WITH_VLLM[name]
    assert case.says in refusal(*case.arguments)


@pytest.mark.server
def test_a_family_that_cannot_run_staged_is_refused(tmp_path: Path) -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))["text_config"]
    config |= {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    line = refusal(str(tmp_path), "--method", "fastv")
    assert "LlamaForCausalLM" in line
    assert "supported: LlavaForConditionalGeneration" in line


def test_help_shows_our_options_and_the_way_to_vllms() -> None:
    ended = run("serve", "--help")
    assert ended.returncode == 0
    for option in ("--method", "--preset", "--hidrop-config", "--vllm-help"):
        assert option in ended.stdout
