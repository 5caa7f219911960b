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
from vllm.config import VllmConfig
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs

from scripts import figure
from vllm_hidrop.cli.app import app
from vllm_hidrop.engine import configure as configure_module
from vllm_hidrop.engine import gate
from vllm_hidrop.verify.tiny_models import make_llava

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


@pytest.mark.parametrize(("is_v2", "mode"), [(True, CUDAGraphMode.FULL_DECODE_ONLY), (False, CUDAGraphMode.NONE)])
def test_the_readmes_command_passes_the_gate_on_a_gpu_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_v2: bool, mode: CUDAGraphMode
) -> None:
    (line,) = (line for line in shell_lines(ROOT / "README.md") if line.startswith("hidrop serve llava-hf"))
    model, *rest = shlex.split(line, comments=True)[2:]
    assert model == "llava-hf/llava-1.5-7b-hf"
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", is_v2)
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    for module in (gate, configure_module):
        monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    chosen: list[Any] = []
    set_graphs = configure_module._set_graphs

    def note(config: Any) -> None:
        set_graphs(config)
        chosen.append((config.compilation_config.cudagraph_mode, config.compilation_config.mode))

    monkeypatch.setattr(configure_module, "_set_graphs", note)
    configure(str(make_llava(tmp_path)), rest)
    assert chosen[0] == (mode, CompilationMode.NONE)


def configure(model: str, words: list[str]) -> None:
    """Make the engine's configuration of a ``hidrop serve`` command, as the server does before it starts."""
    from hidrop_server.control import arguments, choice

    args = accept_serve([model, *words])
    arguments.apply_choice(args, choice.check_choice({"method": "fastv"}))
    AsyncEngineArgs.from_cli_args(args).create_engine_config()


def targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_path_and_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|\$ )make ([a-z0-9-]+)", text)) <= targets()
    for path in re.findall(r"`((?:vllm_hidrop|server|loadtests|deploy|docs|examples|scripts|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / path).exists(), path
