"""docs/accuracy.png: accuracy against vision tokens, from the figures' file. Knows no server."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_hidrop.lab.accuracy.rows import Group

PANELS = (
    ("shipped checkpoints, and methods without training", (Group.SHIPPED, Group.EQUAL, Group.LATE, Group.WIDE)),
    ("ablations, trained", (Group.ABLATION,)),
)
COLOURS = {
    Group.SHIPPED: "black",
    Group.EQUAL: "tab:orange",
    Group.LATE: "tab:green",
    Group.WIDE: "tab:purple",
    Group.ABLATION: "tab:blue",
}
SUFFIX = {Group.EQUAL: " (no training)", Group.LATE: " (no training, late cut)", Group.WIDE: " (no training)"}
NUM_LABELS = 22
"""As many fit above each other."""
LABEL_TOKENS, FULL_TOKENS = 310, 500
"""Where the labels stand; points right of the second are labelled at their left."""
DODGE_TOKENS = 4
"""Points with as many tokens as another stand this far to its right, so that intervals do not cover each other."""


def draw(result: Mapping[str, Any], png: Path) -> None:
    """Write the figure; rows whose server reported no tokens are left out."""
    from matplotlib.figure import Figure

    known = [row for row in result["rows"] if row["mean_vision_tokens"] is not None]
    panels = [(title, [row for row in known if row["group"] in groups]) for title, groups in PANELS]
    panels = [(title, rows) for title, rows in panels if rows]
    figure = Figure(figsize=(6.5 * len(panels), 5.5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, rows) in zip(all_axes, panels, strict=True):
        _panel(axes, rows)
        axes.set(title=title, xlabel="vision tokens per layer, mean over layers; equal ones stand side by side")
        axes.set_xlim(0, 640)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("accuracy, % (95 % interval)")
    figure.savefig(png, format="png", dpi=110)


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    places = dodged([row["mean_vision_tokens"] for row in rows])
    heights = [100 * row["accuracy"] for row in rows]
    ends = [end for row in rows for end in row["interval"]]
    gap = 100 * (max(ends) - min(ends)) / NUM_LABELS
    is_left = [place < FULL_TOKENS for place in places]
    beside = spaced([height for height, left in zip(heights, is_left, strict=True) if left], gap)
    axes.set_ylim(min([100 * min(ends), *beside]) - gap, max([100 * max(ends), *beside]) + gap)
    spread = iter(beside)
    for row, place, height, left in zip(rows, places, heights, is_left, strict=True):
        low, high = (100 * end for end in row["interval"])
        colour = COLOURS[Group(row["group"])]
        errors = [[max(0.0, height - low)], [max(0.0, high - height)]]
        axes.errorbar([place], [height], yerr=errors, fmt="o", color=colour, capsize=2, markersize=5)
        label = row["label"] + SUFFIX.get(Group(row["group"]), "")
        if left:
            arrow = {"arrowstyle": "-", "color": colour, "alpha": 0.4, "linewidth": 0.8, "relpos": (0, 0.5)}
            to = (LABEL_TOKENS, next(spread))
            axes.annotate(label, (place, height), to, fontsize=8, va="center", color=colour, arrowprops=arrow)
        else:
            axes.annotate(
                label, (place, height), (-8, 0), textcoords="offset points", ha="right", va="center", fontsize=8
            )


def dodged(tokens: Sequence[float]) -> list[float]:
    """Tokens, moved right by a step for every earlier point within one step."""
    return [now + DODGE_TOKENS * _near(now, tokens[:index]) for index, now in enumerate(tokens)]


def _near(now: float, earlier: Iterable[float]) -> int:
    return sum(abs(now - other) < DODGE_TOKENS for other in earlier)


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """The heights in their order, moved apart to at least ``gap`` around their middle."""
    if not heights:
        return []
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved: list[float] = []
    for index in order:
        moved.append(max(heights[index], moved[-1] + gap) if moved else heights[index])
    shift = (sum(heights) - sum(moved)) / len(heights)
    result = [0.0] * len(heights)
    for index, height in zip(order, moved, strict=True):
        result[index] = height + shift
    return result
