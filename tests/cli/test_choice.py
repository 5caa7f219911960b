"""The pruning choice is written alike for every command, and help shows all of what was written for it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.command_line import commands, options
from vllm_hidrop.cli.app import app
from vllm_hidrop.cli.options import Choice

CHOOSING = ("plan", "capacity", "serve")
SPELLINGS = ("--method", "--preset", "--options", "--force", "--hidrop-config")


@pytest.mark.parametrize("command", CHOOSING)
def test_every_command_that_asks_a_checkpoint_has_every_way_to_choose(command: str) -> None:
    assert set(SPELLINGS) <= {option.name for option in options() if option.command == (command,)}


def test_options_on_the_command_line_go_over_those_of_the_configuration(tmp_path: Path) -> None:
    whole = {"method": "fastv", "options": {"layer": 3, "keep": 0.25}, "force": True}
    (tmp_path / "choice.json").write_text(json.dumps(whole), encoding="utf-8")
    for config in (json.dumps(whole), str(tmp_path / "choice.json")):
        assert Choice(hidrop_config=config).read() == whole
        changed = Choice(method="random", options='{"keep": 9}', hidrop_config=config).read()
        assert changed == {"method": "random", "options": {"layer": 3, "keep": 9}, "force": True}
    assert Choice().read() == {}
    assert Choice(force=True).read() == {"force": True}


@pytest.mark.parametrize("spelling", ["flags", "configuration"])
def test_plan_takes_both_spellings(spelling: str) -> None:
    flags = ("--method", "hidrop", "--preset", "tok48", "--options", '{"scale": true}', "--force")
    config = {"method": "hidrop", "preset": "tok48", "options": {"scale": True}, "force": True}
    given = flags if spelling == "flags" else ("--hidrop-config", json.dumps(config))
    result = CliRunner().invoke(app, ["plan", "embedded", "--json", *given])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["preset"] == "tok48"


def test_serve_hands_on_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Any] = []

    def main(*given: Any) -> int:
        handed.append(given)
        return 0

    monkeypatch.setattr("hidrop_server.main", main)
    chosen = ("--method", "fastv", "--options", '{"layer": 3}', "--force")
    assert CliRunner().invoke(app, ["serve", "model", *chosen, "--max-num-seqs", "8"]).exit_code == 0
    choice = {"method": "fastv", "options": {"layer": 3}, "force": True}
    assert handed == [("model", choice, ["--max-num-seqs", "8"])]


def test_a_configuration_of_the_wrong_form_is_refused_though_options_go_over_it() -> None:
    config = '{"method": "fastv", "options": 5}'
    result = CliRunner().invoke(app, ["plan", "7b", "--options", '{"layer": 3}', "--hidrop-config", config])
    assert result.exit_code == 2
    assert "options: Input should be a valid dictionary" in result.stderr


COMMANDS = {" ".join(words): command for words, command in commands()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_word_that_was_written_for_it(name: str) -> None:
    """Rich takes text in square brackets for markup and swallows it."""
    command = COMMANDS[name]
    result = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"})
    shown = _plain(result.stdout)
    written = [command.help, command.epilog, *(getattr(each, "help", None) for each in command.params)]
    written += [each.show_default for each in command.params if isinstance(getattr(each, "show_default", None), str)]
    for text in filter(None, written):
        assert _plain(text) in shown, text


def _plain(text: str) -> str:
    """Without what a table of any width puts between words."""
    return re.sub(r"[\s│╭╮╰╯─]+", "", text)
