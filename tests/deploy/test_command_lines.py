"""Every command line in `deploy/` is one that `hidrop serve` accepts, and no YAML file there surprises its reader."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.deploy.test_compose import FORMS, project
from tests.deploy.test_containers import DOCKERFILES, last_stage
from tests.deploy.test_kubernetes import OVERLAYS, container
from tests.deploy.test_systemd import UNIT, settings
from tests.deploy.tools import DEPLOY, accepts, files
from vllm_hidrop.cli.app import app

YAML_RULES = json.dumps(
    {
        "extends": "default",
        "rules": {
            "line-length": {"max": 120},
            "document-start": "disable",
            "comments": {"min-spaces-from-content": 1},
            "braces": {"max-spaces-inside": 1},
        },
    }
)


def command_lines() -> Iterator[tuple[str, list[str]]]:
    for path in DOCKERFILES:
        yield path.name, json.loads(dict(last_stage(path))["CMD"])
    for names in FORMS:
        yield "+".join(names), project(names)["services"]["hidrop"]["command"]
    for overlay in OVERLAYS:
        yield f"kubernetes {overlay}", container(overlay)["args"]
    (start,) = settings(UNIT.read_text())["ExecStart"]
    (own,) = settings((UNIT.parent / "hidrop.env").read_text())["HIDROP_ARGUMENTS"]
    yield "systemd", shlex.split(start.replace("$HIDROP_ARGUMENTS", own))[2:]


def test_hidrop_serve_accepts_every_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from hidrop_server.control import arguments

    parsed = []

    def serve(model: str | None, choice: dict[str, Any], vllm_args: list[str]) -> int:
        parsed.append(arguments.parse(model, vllm_args, choice.get("method")))
        return 0

    monkeypatch.setattr("hidrop_server.main", serve)
    for where, words in command_lines():
        answer = CliRunner().invoke(app, ["serve", *words], catch_exceptions=False)
        assert answer.exit_code == 0, where
        args = parsed[-1]
        assert args.port == 8000, where
        assert args.host == ("127.0.0.1" if where == "systemd" else "0.0.0.0"), where
        assert args.shutdown_timeout > 0, where
        assert "--enforce-eager" not in words, f"{where}: on a GPU decode steps would replay no graph"


def test_yaml_is_tidy() -> None:
    generated = {DEPLOY / "kubernetes" / "base" / "prometheus-rule.yaml"}
    found = [path for path in files(".yaml", ".yml") if path.parent != DEPLOY / "prometheus" and path not in generated]
    assert len(found) > 10
    accepts("yamllint", "--strict", "-d", YAML_RULES, *found)
