"""Draws accuracy against mean vision tokens per layer, with intervals: result files, and the accuracy document's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat

from vllm_hidrop.lab.evaluate.reading import read_json
from vllm_hidrop.outputs import write_file

Span = tuple[FiniteFloat, FiniteFloat]
NUM_LABELS = 22
"""As many labels fit above each other."""
LABEL_TOKENS, FULL_TOKENS = 310, 500
"""Where the labels stand, in vision tokens; points right of the second have theirs at their left."""
DODGE_TOKENS = 4
"""Points of equal tokens are drawn this many tokens apart, so that their intervals do not cover each other."""


@dataclass(frozen=True)
class Point:
    """One mark: accuracy in [0, 1] with its interval."""

    label: str
    vision_tokens: float
    accuracy: float
    interval: tuple[float, float]
    colour: str = "C0"


class _One(BaseModel):
    task: str
    accuracy: FiniteFloat
    interval: Span
    mean_vision_tokens: FiniteFloat | None


class _Intervals(BaseModel):
    dense: Span
    hidrop: Span


class _Comparison(BaseModel):
    dense: FiniteFloat
    hidrop: FiniteFloat
    intervals: _Intervals
    mean_vision_tokens: FiniteFloat | None
    mean_vision_tokens_dense: FiniteFloat | None


def read_points(path: Path) -> list[Point]:
    """One point of a run, two of a comparison; ValueError: no ``hidrop eval`` result, or one without vision tokens."""
    if "dense" in read_json(path, dict[str, Any]):
        two = read_json(path, _Comparison)
        return [
            _point(path, f"{path.stem} dense", two.mean_vision_tokens_dense, two.dense, two.intervals.dense),
            _point(path, f"{path.stem} hidrop", two.mean_vision_tokens, two.hidrop, two.intervals.hidrop),
        ]
    one = read_json(path, _One)
    return [_point(path, path.stem, one.mean_vision_tokens, one.accuracy, one.interval)]


def _point(path: Path, label: str, vision_tokens: float | None, accuracy: float, interval: Span) -> Point:
    if vision_tokens is None:
        raise ValueError(f"{path}: expected mean_vision_tokens; only hidrop servers report them")
    return Point(label, vision_tokens, accuracy, interval)


def draw_results(results: Sequence[Path], png: Path) -> None:
    """Draw the result files of ``hidrop eval``; ValueError: matplotlib is missing, or a file is no result."""
    runs = [read_points(path) for path in results]
    figure, (axes,) = _figure(1, (7, 4.5))
    for points, colour in zip(runs, (f"C{number}" for number in count()), strict=False):
        for point in points:
            _mark(axes, point, point.vision_tokens, colour)
            place = (point.vision_tokens, 100 * point.accuracy)
            axes.annotate(point.label, place, textcoords="offset points", xytext=(6, -12), fontsize=8)
        axes.plot([point.vision_tokens for point in points], [100 * point.accuracy for point in points], color=colour)
    axes.set(xlabel="vision tokens per layer, mean over layers and questions")
    axes.margins(x=0.2)  # room for the labels
    axes.set_xlim(left=0)
    _save(figure, png)


def draw_panels(panels: Mapping[str, Sequence[Point]], png: Path) -> None:
    """Draw panels of many points side by side, by title, their labels in a column."""
    figure, all_axes = _figure(len(panels), (6.5 * len(panels), 5.5))
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        _panel(axes, points)
        axes.set(title=title, xlabel="vision tokens per layer, mean over layers; equal ones stand side by side")
        axes.set_xlim(0, 640)
    _save(figure, png)


def _figure(num_panels: int, size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(1, num_panels, squeeze=False)[0]
    for axes in all_axes:
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("accuracy, % (95 % interval)")
    return figure, all_axes


def _save(figure: Any, png: Path) -> None:
    whole = BytesIO()
    figure.savefig(whole, format="png", dpi=110)
    write_file(png, whole.getvalue())


def _mark(axes: Any, point: Point, place: float, colour: str) -> None:
    height, (low, high) = 100 * point.accuracy, (100 * end for end in point.interval)
    # Rounding can put an interval's end a hair on the wrong side of the mean.
    errors = [[max(0.0, height - low)], [max(0.0, high - height)]]
    axes.errorbar([place], [height], yerr=errors, fmt="o", color=colour, capsize=2, markersize=5)


def _panel(axes: Any, points: Sequence[Point]) -> None:
    places = dodged([point.vision_tokens for point in points])
    heights = [100 * point.accuracy for point in points]
    ends = [100 * end for point in points for end in point.interval]
    gap = (max(ends) - min(ends)) / NUM_LABELS
    is_left = [place < FULL_TOKENS for place in places]
    beside = spaced([height for height, left in zip(heights, is_left, strict=True) if left], gap)
    axes.set_ylim(min([*ends, *beside]) - gap, max([*ends, *beside]) + gap)
    spread = iter(beside)
    for point, place, height, left in zip(points, places, heights, is_left, strict=True):
        _mark(axes, point, place, point.colour)
        if left:
            arrow = {"arrowstyle": "-", "color": point.colour, "alpha": 0.4, "linewidth": 0.8, "relpos": (0, 0.5)}
            to, more = (LABEL_TOKENS, next(spread)), {"color": point.colour, "arrowprops": arrow}
        else:
            to, more = (-8, 0), {"textcoords": "offset points", "ha": "right"}
        axes.annotate(point.label, (place, height), to, fontsize=8, va="center", **more)


def dodged(tokens: Sequence[float]) -> list[float]:
    """The tokens, each moved right by a step for every earlier point within one step."""
    num_near = (sum(abs(now - other) < DODGE_TOKENS for other in tokens[:index]) for index, now in enumerate(tokens))
    return [now + DODGE_TOKENS * near for now, near in zip(tokens, num_near, strict=True)]


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """The heights in their order, moved apart to at least ``gap`` around their middle."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved: dict[int, float] = {}
    lowest = float("-inf")
    for index in order:
        moved[index] = lowest = max(heights[index], lowest + gap)
    shift = (sum(heights) - sum(moved.values())) / max(1, len(heights))
    return [moved[index] + shift for index in range(len(heights))]
