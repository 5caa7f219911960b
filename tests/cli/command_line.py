"""The commands as the parser knows them, so that one that is added is tested with the others; and how they are run."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import typer

from vllm_hidrop.cli.app import app

COMMAND = (sys.executable, "-c", "from vllm_hidrop.cli.app import app; app()")


class Option(NamedTuple):
    """A parameter of a command, by the command's words and the parameter's own name."""

    command: tuple[str, ...]
    name: str
    parameter: Any

    @property
    def kind(self) -> Any:
        """Of its values: a Python type, or a list of one."""
        return self.parameter.type_descriptor.annotation

    def __str__(self) -> str:
        return " ".join((*self.command, self.name))


def commands(group: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group that can be named, with its words."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        yield (*words, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))


def options() -> list[Option]:
    """Every parameter of every command."""
    return [Option(words, each.opts[0], each) for words, command in commands() for each in command.params]


def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command as a person runs it."""
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    return subprocess.run([*COMMAND, *map(str, arguments)], text=True, timeout=200, check=False, **settings)


def the_line(ended: subprocess.CompletedProcess[str]) -> str:
    """What a command that was refused said, which must be one line, with exit code 2."""
    assert ended.returncode == 2, ended.stderr
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("hidrop: ")
    assert len(lines[0]) <= 510
    return lines[0]
