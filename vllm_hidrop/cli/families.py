"""``hidrop families``: the catalogue of model families, read from FAMILIES, with what was run of each."""

import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from vllm_hidrop.methods import METHODS, Adaptive
from vllm_hidrop.models.families import FAMILIES
from vllm_hidrop.models.family import Family
from vllm_hidrop.terminal import Terminal


def run(as_json: bool) -> None:
    """Print all families as a table or JSON."""
    rows = catalogue()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("Family", "Text model: layers", "Tower", "Takes", "Run with", title="Model families")
    for row in rows:
        texts = "\n".join(f"{text}: {form}" for text, form in row["text_models"].items())
        table.add_row(row["title"], texts, "\n".join(row["towers"]), shown_media(row), shown_runs(row))
    terminal = Terminal()
    terminal.show(table)
    for name, options in reduced_methods().items():
        without = [_with_towers(row, name) for row in rows if name in row["left_out"]]
        terminal.print(
            f"Every method runs in every family. The part of {name} in the tower ({options}) is left out of: "
            f"{', '.join(without)}.",
            highlight=False,
        )


def _with_towers(row: Mapping[str, Any], method: str) -> str:
    """A family that leaves out a method's part in the tower, with the towers if others of it do not."""
    towers = row["left_out"][method]["towers"]
    return row["title"] if towers == row["towers"] else f"{row['title']} with {' or '.join(towers)}"


def catalogue() -> list[dict[str, Any]]:
    """Per family, JSON values: its parts, what it takes, what is left out of methods, and what was run."""
    return [describe(family) for family in FAMILIES.values()]


def describe(family: Family) -> dict[str, Any]:
    """One row of :func:`catalogue`."""
    towers = list(dict.fromkeys(short(tower) for tower in family.towers))
    reducible = [short(tower) for tower in family.reducible_towers]
    left_out = [tower for tower in towers if tower not in reducible]
    return {
        "title": family.title,
        "architecture": family.stock,
        "text_models": {text: str(form) for text, form in family.layers.items()},
        "towers": towers,
        "images": ("any size" if family.is_dynamic else "one size") if family.has_images else None,
        "video": family.has_video,
        "image_reuse": family.reuses_images,
        "left_out": {name: {"options": parts, "towers": left_out} for name, parts in reduced_methods().items()}
        if left_out
        else {},
        "run": {
            "random weights, CPU": [f"{text} + {short(tower)}" for text, tower in family.ran],
            "real weights, CPU": [f"{text} + {short(tower)}" for text, tower in family.ran_trained],
        },
    }


def reduced_methods() -> dict[str, str]:
    """Methods that by default have a part in the vision tower -> the options that make it."""
    adaptive = [method for method in METHODS.values() if issubclass(method, Adaptive)]
    return {method.name: ", ".join(method.without_reduction) for method in adaptive if method.without_reduction}


def short(tower: str) -> str:
    """A tower's ``model_type`` without what all have in common."""
    return tower.removesuffix("_model").removesuffix("_vision")


def shown_media(row: Mapping[str, Any]) -> str:
    """What a family takes, in words."""
    images = f"images of {row['images']}" if row["images"] else None
    return ", ".join(each for each in (images, "video" if row["video"] else None) if each)


def shown_runs(row: Mapping[str, Any]) -> str:
    """What was run of a family, in words."""
    if row["run"]["real weights, CPU"]:
        return "real weights (embedded)"
    return "random weights" if row["run"]["random weights, CPU"] else "not run"
