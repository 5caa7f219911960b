"""``hidrop methods``: the catalogue of pruning methods, read from METHODS and the methods' docstrings."""

import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich.markdown import Markdown
from rich.table import Column, Table
from typer import BadParameter

from vllm_hidrop.methods import METHODS, Method
from vllm_hidrop.plan.names import unknown
from vllm_hidrop.terminal import Terminal


def run(name: str | None, as_json: bool) -> None:
    """Print all methods as a table, or all about one; or JSON. Raises BadParameter: no such method."""
    if name is not None and name not in METHODS:
        raise BadParameter(unknown("unknown pruning method", name, METHODS))
    catalogue = [_describe(method) for method in METHODS.values() if name in (None, method.name)]
    if as_json:
        print(json.dumps(catalogue, indent=2))
    else:
        terminal = Terminal()
        terminal.show(_table(catalogue))
        hint = "`hidrop methods NAME` says what differs from its paper and its code."
        terminal.print(hint if name is None else Markdown(catalogue[0]["about"]))


def about(method: type[Method]) -> str:
    """What a method's docstring says, as Markdown: idea, source, what differs from paper and code, options."""
    text = re.sub(":[a-z]+:`", "`", inspect.cleandoc(method.__doc__ or "").replace("``", "`"))
    return "\n\n".join(_one_line(paragraph.splitlines()) for paragraph in text.split("\n\n"))


def _one_line(lines: Iterable[str]) -> str:
    return " ".join(line.strip() for line in lines)


def _describe(method: type[Method]) -> dict[str, Any]:
    return {
        "name": method.name,
        "paper": method.paper,
        "summary": method.summary,
        "about": about(method),
        "options": {field.name: field.default for field in dataclasses.fields(method)},
        "presets": {name: dict(values) for name, values in method.presets.items()},
        "default_preset": method.default_preset,
        "other_families": method.elsewhere,
    }


def _table(catalogue: list[dict[str, Any]]) -> Table:
    options = Column(
        "Options and defaults", min_width=2 + max((len(o) for row in catalogue for o in row["options"]), default=0)
    )
    table = Table("Method", "What it keeps", options, "Presets", title="Pruning methods")
    for row in catalogue:
        presets = [f"{name} (default)" if name == row["default_preset"] else name for name in row["presets"]]
        summary = f"{row['summary']}\n{row['paper']}"
        if row["other_families"]:
            summary += f"\nbeyond LLaVA-1.5: {row['other_families']}"
        table.add_row(row["name"], summary, _options(row["options"]), "\n".join(presets) or "-")
    return table


def _options(options: Mapping[str, Any]) -> str:
    """One option a line, with its default as JSON, the way ``--options`` takes it."""
    return "\n".join(f"{name} = {json.dumps(default)}" for name, default in options.items()) or "-"
