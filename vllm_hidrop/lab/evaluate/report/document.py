"""Writes docs/accuracy.md and docs/accuracy.png from the figures of docs/accuracy.json."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_hidrop.lab.evaluate.figure import Point, draw_panels
from vllm_hidrop.lab.evaluate.report.rows import Group
from vllm_hidrop.lab.templates import render

Figures = Mapping[str, Any]
TEMPLATE = Path(__file__).with_name("accuracy.md.jinja")
SAME_GOAL = 0.99
POINTS_GOAL = 0.3
"""Goals for served against training code: the least share of equal answers, the most points between accuracies."""
PANELS = {
    "shipped checkpoints, and methods without training": (Group.SHIPPED, Group.EQUAL, Group.LATE, Group.WIDE),
    "ablations, trained": (Group.ABLATION,),
}
COLOURS = {
    Group.SHIPPED: "black",
    Group.EQUAL: "tab:orange",
    Group.LATE: "tab:green",
    Group.WIDE: "tab:purple",
    Group.ABLATION: "tab:blue",
}
SUFFIX = {Group.EQUAL: " (no training)", Group.LATE: " (no training, late cut)", Group.WIDE: " (no training)"}


def document(result: Figures) -> str:
    """The whole Markdown text; a table without rows is left out."""
    groups = {str(group): [row for row in result["rows"] if row["group"] == group] for group in Group}
    values = {"selection": None, **result, "groups": groups, "same_goal": SAME_GOAL, "points_goal": POINTS_GOAL}
    filters: dict[str, Callable[..., Any]] = {
        "percent": percent,
        "between": between,
        "signed": signed,
        "is_goal_met": is_goal_met,
    }
    return render(TEMPLATE, values, filters)


def percent(share: float | None) -> str:
    """A share as ``91.2``, of 100."""
    return "-" if share is None else f"{100 * share:.1f}"


def between(interval: Sequence[float] | None) -> str:
    """An interval as ``89.0 to 93.1``, of 100."""
    return "-" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"


def signed(interval: Sequence[float]) -> str:
    """An interval in points with their sign: ``-1.2 to +0.4``."""
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def is_goal_met(one: Figures) -> bool:
    """Whether served and training code meet both goals."""
    return bool(one["same"] >= SAME_GOAL and abs(100 * one["difference"]) <= POINTS_GOAL + 1e-9)


def draw(result: Figures, png: Path) -> None:
    """Write the figure; rows whose server reported no tokens are left out."""
    known = [row for row in result["rows"] if row["mean_vision_tokens"] is not None]
    panels = {title: [_point(row) for row in known if row["group"] in groups] for title, groups in PANELS.items()}
    draw_panels({title: points for title, points in panels.items() if points}, png)


def _point(row: Figures) -> Point:
    group = Group(row["group"])
    label = row["label"] + SUFFIX.get(group, "")
    return Point(label, row["mean_vision_tokens"], row["accuracy"], row["interval"], COLOURS[group])
