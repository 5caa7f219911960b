"""The dashboards' panels as one picture, for people without Grafana; needs matplotlib."""

import math
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_hidrop.monitoring.panels import Dashboard, Panel, Row, Unit
from vllm_hidrop.monitoring.prometheus import Series
from vllm_hidrop.outputs import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Mapping[str, Sequence[Series]]  # the series that each expression gave
WIDTH_INCHES = 17.0
PANEL_INCHES, STAT_INCHES = 2.5, 1.2
SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LONGEST_LEGEND = 8


def draw(dashboards: Sequence[Dashboard], lines: Lines, file: Path) -> None:
    """Write a PNG: per row of a dashboard a heading and its panels; ``lines`` is keyed by the panels' expressions."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [(dashboard, row) for dashboard in dashboards for row in dashboard.rows]
    heights = [height_inches(row) for _, row in rows]
    with mpl.rc_context({"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights)))
        parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)
        for part, (dashboard, row), height in zip(parts[:, 0], rows, heights, strict=True):
            part.suptitle(f"{dashboard.title}: {row.title}", x=0.01, ha="left", fontsize=11, fontweight="bold")
            part.subplots_adjust(0.045, 0.3 / height, 0.99, 1 - 0.5 / height, wspace=0.22)
            axes = part.subplots(1, len(row.panels), squeeze=False).flat
            for panel, cell in zip(row.panels, axes, strict=True):
                _draw_panel(cell, panel, lines)
        whole = BytesIO()  # an interrupted run leaves no half a picture
        figure.savefig(whole, dpi=80, format="png")
    write_file(file, whole.getvalue())


def height_inches(row: Row) -> float:
    """Height of a row in the picture; a row of single numbers is lower."""
    return STAT_INCHES if all(panel.is_stat for panel in row.panels) else PANEL_INCHES


def _draw_panel(axes: "Axes", panel: Panel, lines: Lines) -> None:
    axes.set_title(panel.title, loc="left")
    found = [
        (_legend(query.legend, series.labels), series.points)
        for query in panel.queries
        for series in lines[query.expr]
        if any(math.isfinite(value) for _, value in series.points)
    ]
    if not found:
        axes.axis("off")
        axes.text(0.5, 0.5, "no data", ha="center", va="center", color="grey", transform=axes.transAxes)
    elif panel.is_stat:
        _write_numbers(axes, panel, found)
    else:
        _draw_lines(axes, panel, found)


def _write_numbers(axes: "Axes", panel: Panel, found: list[tuple[str, Any]]) -> None:
    axes.axis("off")
    if len(found) == 1:
        legend, points = found[0]
        text = legend if panel.unit is Unit.COUNT else _number(points[-1][1], panel.unit)
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=22, transform=axes.transAxes)
        return
    text = "\n".join(f"{legend}: {_number(points[-1][1], panel.unit)}" for legend, points in found)
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=10, transform=axes.transAxes)


def _draw_lines(axes: "Axes", panel: Panel, found: list[tuple[str, Any]]) -> None:
    start = min(points[0][0] for _, points in found)
    for legend, points in found:
        times, values = zip(*points, strict=True)
        axes.plot([time - start for time in times], values, label=legend, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: _number(value, panel.unit))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} s")
    axes.grid(alpha=0.3)
    if any(legend for legend, _ in found):
        axes.legend(fontsize=7, frameon=False, ncols=2 if len(found) > LONGEST_LEGEND // 2 else 1)


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), template).strip()


def _number(value: float, unit: Unit) -> str:
    if unit is Unit.SHARE:
        return f"{100 * value:.3g} %"
    if unit is Unit.SECONDS:
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    suffix = {
        Unit.BYTES: "B",
        Unit.BYTE_RATE: "B/s",
        Unit.FLOPS: "FLOP/s",
        Unit.TIMES: "x",
        Unit.RATE: "/s",
        Unit.REQUESTS: "/s",
    }.get(unit, "")
    scale, prefix = next(((scale, prefix) for scale, prefix in SCALES if abs(value) >= scale), (1, ""))
    return f"{value / scale:.3g} {prefix}{suffix}".strip()
