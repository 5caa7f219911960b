"""Accuracy against mean vision tokens per layer, from the result files of ``hidrop eval``. Knows only those files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from vllm_hidrop.lab.evaluate.reading import has_fields, read_json
from vllm_hidrop.outputs import write_file

ONE = ("accuracy", "interval", "mean_vision_tokens", "task")
TWO = ("dense", "hidrop", "intervals", "mean_vision_tokens", "mean_vision_tokens_dense")


@dataclass(frozen=True)
class Point:
    """One mark: accuracy in [0, 1] with its interval."""

    label: str
    vision_tokens: float
    accuracy: float
    interval: tuple[float, float]


def read_points(path: Path) -> list[Point]:
    """One point of a run, two of a comparison.

    Raises:
        ValueError: not a result, or one of a server that reports no vision tokens.
    """
    value = has_fields(read_json(path), (), str(path))
    if "dense" in value:
        has_fields(value, TWO, str(path))
        has_fields(value["intervals"], ("dense", "hidrop"), f"{path}, intervals")
        tokens = {"dense": value["mean_vision_tokens_dense"], "hidrop": value["mean_vision_tokens"]}
        return [_point(path, f"{path.stem} {arm}", n, value[arm], value["intervals"][arm]) for arm, n in tokens.items()]
    has_fields(value, ONE, str(path))
    return [_point(path, path.stem, value["mean_vision_tokens"], value["accuracy"], value["interval"])]


def _point(path: Path, label: str, vision_tokens: Any, accuracy: float, interval: Sequence[float]) -> Point:
    if vision_tokens is None:
        raise ValueError(f"{path}: expected mean_vision_tokens; only hidrop servers report them")
    try:
        low, high = interval
        point = Point(label, float(vision_tokens), float(accuracy), (float(low), float(high)))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{path}: expected numbers, an interval of two among them") from None
    if not all(map(math.isfinite, (point.vision_tokens, point.accuracy, *point.interval))):
        raise ValueError(f"{path}: expected finite numbers, got {point}")
    return point


def draw(results: Sequence[Path], png: Path) -> None:
    """Write the plot.

    Raises:
        ValueError: no matplotlib, or a file that is no result.
    """
    runs = [read_points(path) for path in results]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for points in runs:
        accuracy = [100 * point.accuracy for point in points]
        below = [100 * (point.accuracy - point.interval[0]) for point in points]
        above = [100 * (point.interval[1] - point.accuracy) for point in points]
        # Rounding can put an interval's end a hair on the wrong side of the mean.
        errors = [[max(0.0, one) for one in side] for side in (below, above)]
        axes.errorbar([point.vision_tokens for point in points], accuracy, yerr=errors, fmt="o-", capsize=4)
        for point, height in zip(points, accuracy, strict=True):
            place = (point.vision_tokens, height)
            axes.annotate(point.label, place, textcoords="offset points", xytext=(6, -12), fontsize=8)
    axes.set(xlabel="vision tokens per layer, mean over layers and questions", ylabel="accuracy, % (95 % interval)")
    axes.margins(x=0.2)  # room for the labels
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    whole = BytesIO()
    figure.savefig(whole, format="png")
    write_file(png, whole.getvalue())
