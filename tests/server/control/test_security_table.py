"""docs/security.md against the code: every flag is there with its default, every test exists; no engine."""

import ast
import json
import re
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from vllm import envs

from hidrop_server.control.arguments import parse
from hidrop_server.control.settings import SETTINGS

HERE = Path(__file__).parents[1]
DOCUMENT = HERE.parents[1] / "docs" / "security.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| Threat", "| Status"))
]
NAMED = sorted({name for row in ROWS for name in re.findall(r"`(.+?)`", row[2])})


@pytest.fixture(scope="module")
def defaults() -> Namespace:
    return parse("any/model", [])


VARIABLES = {each.name: each.default for each in SETTINGS if not each.name.startswith("--")}
STAND_IN = {each.variable for each in SETTINGS}


@pytest.mark.parametrize("setting", NAMED)
def test_a_setting_of_the_table_is_there_with_its_default(
    setting: str, defaults: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, says = setting.partition("=")
    if name in STAND_IN:
        return
    if name.startswith("--"):
        value = getattr(defaults, name.removeprefix("--").replace("-", "_"))
    else:
        monkeypatch.delenv(name, raising=False)
        envs.disable_envs_cache()  # an engine of an earlier test has frozen them
        value = VARIABLES.get(name, getattr(envs, name))
    assert (_number(value) == json.loads(says)) if says else not value


def test_every_safety_flag_and_default_of_ours_is_in_the_table() -> None:
    ours = {each.name for each in SETTINGS if each.name.startswith("--") and not each.embedded}
    named = {setting.partition("=")[0] for setting in NAMED}
    limits = {"VLLM_MAX_IMAGE_PIXELS", "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB"}
    assert (ours | limits) - named == {"--custom-histogram-buckets"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_test_of_the_table_exists(row: list[str]) -> None:
    names = re.findall(r"`(.+?)`", row[3])
    assert names or row[3] == "vLLM's own"
    for name in names:
        file, entry, function = re.fullmatch(r"(\w+)(?:\[(.+)\]|::(\w+))", name).groups()  # type: ignore[union-attr]
        assert (entry or function) in _names_in(file), name


@cache
def _names_in(file: str) -> set[Any]:
    """Functions, and keys of the tables, of a test file."""
    tree = ast.parse(next(HERE.rglob(f"{file}.py")).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    tables = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    return functions | {key.value for table in tables for key in table.keys if isinstance(key, ast.Constant)}


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str | bool) else value
