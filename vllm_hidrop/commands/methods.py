"""``hidrop methods``: the catalogue of pruning methods, read from METHODS."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from rich.table import Column, Table

from vllm_hidrop.methods import METHODS, Method
from vllm_hidrop.terminal import Terminal


def run(as_json: bool) -> None:
    """Print every method: as a table, or as JSON with the same content."""
    catalogue = [_describe(method) for method in METHODS.values()]
    if as_json:
        print(json.dumps(catalogue, indent=2))
    else:
        Terminal().show(_table(catalogue))


def _describe(method: type[Method]) -> dict[str, Any]:
    return {
        "name": method.name,
        "paper": method.paper,
        "summary": method.summary,
        "options": {field.name: field.default for field in dataclasses.fields(method)},
        "presets": {name: dict(values) for name, values in method.presets.items()},
        "default_preset": method.default_preset,
    }


def _table(catalogue: list[dict[str, Any]]) -> Table:
    options = Column("Options and defaults", min_width=2 + max(len(o) for row in catalogue for o in row["options"]))
    table = Table("Method", "What it keeps", options, "Presets", title="Pruning methods")
    for row in catalogue:
        presets = [f"{name} (default)" if name == row["default_preset"] else name for name in row["presets"]]
        summary = f"{row['summary']}\n{row['paper']}"
        table.add_row(row["name"], summary, _options(row["options"]), "\n".join(presets) or "-")
    return table


def _options(options: Mapping[str, Any]) -> str:
    """One option a line, with its default as JSON, the way ``--options`` takes it."""
    return "\n".join(f"{name} = {json.dumps(default)}" for name, default in options.items()) or "-"
