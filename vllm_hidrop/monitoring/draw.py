"""The dashboards' panels as one picture, for people without Grafana.

Knows the panels and what Prometheus answered; needs matplotlib.
"""

import math
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_hidrop.monitoring.panels import Dashboard, Panel, Unit
from vllm_hidrop.monitoring.prometheus import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Mapping[str, Sequence[Series]]
"""What each expression gave."""
COLUMNS = 4
PANEL_INCHES = (4.2, 2.5)
SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LONGEST_LEGEND = 8


def draw(dashboards: Sequence[Dashboard], lines: Lines, file: Path) -> None:
    """Write the picture: a heading per dashboard, a row of panels per row.

    Args:
        dashboards: what to show.
        lines: by expression of the panels, with its variables as they are in the panel.
        file: a PNG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [(dashboard, row) for dashboard in dashboards for row in dashboard.rows]
    width, height = PANEL_INCHES
    with mpl.rc_context({"font.size": 7, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width * COLUMNS, sum(height * _depth(row.panels) for _, row in rows)))
        parts = figure.subfigures(len(rows), 1, height_ratios=[_depth(row.panels) for _, row in rows], squeeze=False)
        for part, (dashboard, row) in zip(parts[:, 0], rows, strict=True):
            part.suptitle(f"{dashboard.title}: {row.title}", x=0.01, ha="left", fontsize=10, fontweight="bold")
            depth = _depth(row.panels)
            part.subplots_adjust(0.05, 0.12 / depth, 0.99, 1 - 0.2 / depth, wspace=0.22, hspace=0.4)
            axes = part.subplots(depth, COLUMNS, squeeze=False).flat
            for panel, cell in zip(row.panels, axes, strict=False):
                _draw_panel(cell, panel, lines)
            for cell in list(axes):
                cell.axis("off")
        whole = BytesIO()  # an interrupted run leaves no half a picture
        figure.savefig(whole, dpi=80, format="png")
    file.write_bytes(whole.getvalue())


def _depth(panels: Sequence[Panel]) -> int:
    return math.ceil(len(panels) / COLUMNS)


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
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=18, transform=axes.transAxes)
        return
    text = "\n".join(f"{legend}: {_number(points[-1][1], panel.unit)}" for legend, points in found)
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, transform=axes.transAxes)


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
        axes.legend(fontsize=6, frameon=False, ncols=2 if len(found) > LONGEST_LEGEND // 2 else 1)


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), template).strip()


def _number(value: float, unit: Unit) -> str:
    """A value as a person reads it."""
    if unit is Unit.SHARE:
        return f"{100 * value:.3g} %"
    if unit is Unit.SECONDS:
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    suffix = {Unit.BYTES: "B", Unit.FLOPS: "FLOP/s", Unit.TIMES: "x", Unit.RATE: "/s", Unit.REQUESTS: "/s"}.get(
        unit, ""
    )
    scale, prefix = next(((scale, prefix) for scale, prefix in SCALES if abs(value) >= scale), (1, ""))
    return f"{value / scale:.3g} {prefix}{suffix}".strip()
