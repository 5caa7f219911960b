"""What README.md and docs/ show is what the code says: generated parts, pictures, commands, paths; no server."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs

from scripts import figure
from tests.tiny_models import make_llava
from vllm_hidrop.cli.app import app
from vllm_hidrop.engine import gate

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
HISTORY = ("decisions.md", "accuracy.md", "changelog.md", "commands.md")
"""Pages that say what was, or that a measurement or Typer wrote."""
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in HISTORY),
]
BLOCK = re.compile(r"```(?:console|bash)\n(.*?)```", re.DOTALL)
SPAN = re.compile(r"`(hidrop [^`]+)`")
PLACEHOLDERS = ("|", "...", "COMMAND")


def test_the_generated_parts_are_up_to_date() -> None:
    script = ROOT / "scripts" / "readme.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run scripts/readme.py\n{done.stderr[-1000:]}"


@pytest.mark.parametrize(
    ("name", "data"), [("stages.png", figure.stages_data()), ("request.png", figure.request_data())]
)
def test_a_picture_shows_what_the_code_says_today(name: str, data: object) -> None:
    assert figure.shown_in(ROOT / "docs" / name) == data, "run python -m scripts.figure"


def shell_lines(page: Path) -> Iterator[str]:
    """The commands of a page's blocks, each whole, without prompt."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        yield from (re.sub(r"^[$#] ", "", line) for line in block.replace("\\\n", " ").splitlines())


def hidrop_commands(page: Path) -> Iterator[list[str]]:
    """The words behind ``hidrop`` of every command that a page shows, in blocks and in running text."""
    spans = (
        span for span in SPAN.findall(page.read_text(encoding="utf-8")) if not any(p in span for p in PLACEHOLDERS)
    )
    for line in (*shell_lines(page), *spans):
        found = re.match(r"(?:\w+=\S+ )*hidrop (.*)", line)
        if found:
            yield [word for word in shlex.split(found[1], comments=True) if word != "&"]


COMMANDS = [(page.name, words) for page in PAGES for words in hidrop_commands(page)]


def test_the_pages_show_commands() -> None:
    assert len(COMMANDS) > 50


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda each: each if isinstance(each, str) else " ".join(each)
)
def test_a_command_of_a_page_is_one_that_hidrop_has(page: str, words: list[str]) -> None:
    if words[0] == "serve":
        accept_serve(words[1:])
        return
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    assert command.name != "hidrop", f"no such command: {words}"
    command.make_parser(typer.Context(command, info_name=command.name)).parse_args(list(words))


def accept_serve(words: list[str]) -> Any:
    """Parse as ``hidrop serve`` does, our options and vLLM's; starts nothing."""
    from hidrop_server.control import arguments, choice

    parsed = []

    def serve(model: str | None, chosen: dict[str, Any], rest: list[str]) -> int:
        choice.check_choice(chosen)
        parsed.append(arguments.parse(model, rest, chosen.get("method")))
        return 0

    words = ["{}" if word.endswith(".json") else word for word in words]  # a schedule that the reader has made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hidrop_server.main", serve)
        answer = CliRunner().invoke(app, ["serve", *words])
    assert answer.exit_code == 0, answer.output
    return parsed[0] if parsed else None


def test_the_gpu_command_of_the_readme_passes_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = (line for line in shell_lines(ROOT / "README.md") if line.startswith("VLLM_USE_V2"))
    variables, words = line.split(" hidrop serve ")
    model, *rest = shlex.split(words, comments=True)
    assert model == "llava-hf/llava-1.5-7b-hf"
    monkeypatch.setenv(*variables.split("=", 1))
    envs.disable_envs_cache()
    monkeypatch.setattr(gate, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    tiny = str(make_llava(tmp_path))
    configure(tiny, rest)
    with pytest.raises(ValueError, match="CUDA graphs"):
        configure(tiny, [word for word in rest if word != "--enforce-eager"])
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="V2 model runner"):
        configure(tiny, rest)


def configure(model: str, words: list[str]) -> None:
    """Make the engine's configuration of a ``hidrop serve`` command, as the server does before it starts."""
    from hidrop_server.control import arguments, choice

    args = accept_serve([model, *words])
    arguments.apply_choice(args, choice.check_choice({"method": "fastv"}))
    AsyncEngineArgs.from_cli_args(args).create_engine_config()


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_path_and_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|\$ )make ([a-z-]+)", text)) <= targets()
    for path in re.findall(r"`((?:vllm_hidrop|server|loadtests|deploy|docs|examples|scripts|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / path).exists(), path
