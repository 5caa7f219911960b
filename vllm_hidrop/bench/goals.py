"""The goals that were set, as data; tables print them beside what was measured."""

import re
from dataclasses import dataclass
from math import inf

from vllm_hidrop.bench.rows import Row


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of the rows whose name matches."""

    rows: str  # regular expression of whole names
    figure: str  # a key of the row, "share_of_ideal" (ratio/ideal ratio) or "more_than_stock" (ours - stock)
    low: float  # inclusive
    high: float  # inclusive
    text: str  # the bounds in words


GOALS = (
    Goal(r"prefill hidrop, (1 image|8 images) \+ 64 text", "share_of_ideal", 0.90, inf, ">= 90 % of ideal"),
    Goal(r"serve hidrop, requests/s", "ratio", 3.0, inf, ">= 3.0x"),
    Goal(r"serve hidrop, ITL p50 at 8", "ratio", 1.0, inf, ">= 1.00x (ITL <= stock)"),
    Goal(r"kv hidrop, bytes held, .*", "over_token_exact", 0, 1.15, "<= 1.15x token-exact, blocks as planned"),
    Goal(r"kv hidrop, requests held", "ratio", 4.0, inf, ">= 4x"),
    Goal(r"(serve|prefill|decode) hidrop (off|text only), .*", "ratio", 0.98, 1.02, "0.98x..1.02x"),
    Goal(r"engine start", "more_than_stock", -inf, 2.0, "<= stock + 2 s"),
)  # of issue 5, for SHAPES_WITH_GOALS; names without a mode are vLLM's default, compiled
SHAPES_WITH_GOALS = ("bench", "7b")


def goal_of(row: Row) -> Goal | None:
    """The goal that a row is to meet, if any."""
    if row["shape"] not in SHAPES_WITH_GOALS:
        return None
    return next((goal for goal in GOALS if re.fullmatch(goal.rows, row["name"])), None)


def figure(goal: Goal, row: Row) -> float:
    """The figure of a row that the goal bounds."""
    if goal.figure == "share_of_ideal":
        return float(row["ratio"] / row["ideal_ratio"])
    if goal.figure == "more_than_stock":
        return float(row["ours"] - row["stock"])
    return float(row[goal.figure])


def verdict(row: Row) -> str:
    """``reached``, ``missed`` (also: blocks not as planned), ``above`` a ratio's upper bound; empty without a goal."""
    goal = goal_of(row)
    if goal is None:
        return ""
    if row.get("kv_blocks") != row.get("kv_blocks_planned"):
        return "missed"
    value = figure(goal, row)
    if goal.figure == "ratio" and value > goal.high:
        return "above"
    return "reached" if goal.low <= value <= goal.high else "missed"
