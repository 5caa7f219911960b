"""Rows as a picture: per section, how many times better than stock vLLM, and how many were possible (ideal)."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from vllm_hidrop.bench.rows import SECTIONS, Row
from vllm_hidrop.bench.tables import cells
from vllm_hidrop.outputs import write_file

STOCK_COLOUR, OUR_COLOUR, IDEAL_COLOUR = "#b0b0b0", "#3b6ea5", "#d98324"


def check_drawable() -> None:
    """Load matplotlib before anything is measured. Raises ValueError: it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ValueError('--png needs matplotlib: pip install "vllm-hidrop[train]"') from None
    mpl.use("Agg")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG of one panel per section; a bar is a ratio, its label the quantities."""
    import matplotlib.pyplot as plt

    sections = [name for name in SECTIONS if any(row["section"] == name for row in rows)]
    panels = [[row for row in rows if row["section"] == name] for name in sections]
    heights = [len(panel) + 1.6 for panel in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(11, 0.42 * sum(heights) + 0.6),
        layout="constrained",
        height_ratios=heights,
        squeeze=False,
    )
    for axis, name, panel in zip(axes[:, 0], sections, panels, strict=True):
        places = range(len(panel))
        axis.barh([p - 0.2 for p in places], [row["ratio"] for row in panel], 0.4, color=OUR_COLOUR, label="ours")
        axis.barh([p + 0.2 for p in places], [1] * len(panel), 0.4, color=STOCK_COLOUR, label="stock vLLM")
        ideal = [(p, row["ideal_ratio"]) for p, row in enumerate(panel) if row["ideal_ratio"]]
        if ideal:
            axis.plot([r for _, r in ideal], [p - 0.2 for p, _ in ideal], "D", color=IDEAL_COLOUR, label="ideal")
        for place, row in enumerate(panel):
            end = max(row["ratio"], row["ideal_ratio"] or 0, 1)
            _, stock, ours, times, *_ = cells(row)
            axis.text(end, place, f"  {times}: {ours}, stock {stock}", va="center", fontsize=8)
        axis.set_yticks(places, [row["name"] for row in panel], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.6 * max(max(row["ratio"], row["ideal_ratio"] or 0, 1) for row in panel))
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(SECTIONS[name], fontsize=10, loc="left")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside upper right", ncols=3
    )
    axes[-1, 0].set_xlabel("times better than stock vLLM")
    whole = BytesIO()
    figure.savefig(whole, dpi=110, format="png")
    write_file(path, whole.getvalue())
    plt.close(figure)
