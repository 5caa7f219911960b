"""Draws the curves of a calibration and where its schedule cuts."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from vllm_hidrop.lab.calibrate.proposal import Proposal
from vllm_hidrop.outputs import write_file

INJECT_COLOUR, EXIT_COLOUR, FILTER_COLOUR = "#2e7d32", "#b3261e", "#8a8a8a"
COLOURS = ("#3b6ea5", "#d98324", "#7a5195", "#5f9ea0")


def draw(curves: Mapping[str, Any], proposal: Proposal | None, title: str, path: Path) -> None:
    """Write a PNG of four panels from ``Curves.as_json``'s curves; a proposal's layers are marked in every panel."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    num_layers = len(curves["cross"])
    for axis, (heading, lines) in zip(axes.flat, _panels(curves), strict=True):
        for (label, line), colour in zip(lines.items(), COLOURS, strict=False):
            axis.plot(range(1, len(line) + 1), line, marker="o", markersize=3, color=colour, label=label)
        if proposal is not None:
            _mark(axis, proposal, num_layers)
        axis.set_title(heading, fontsize=10)
        axis.set_xlim(0.5, num_layers + 0.9)
        axis.set_xticks(range(1, num_layers + 1, math.ceil(num_layers / 16)))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("layer (one-based)")
    figure.suptitle(title, fontsize=11)
    whole = BytesIO()
    figure.savefig(whole, dpi=110, format="png")
    write_file(path, whole.getvalue())
    plt.close(figure)


def _panels(curves: Mapping[str, Any]) -> list[tuple[str, dict[str, Sequence[float]]]]:
    sweep: dict[str, Sequence[float]] = {"answer tokens unchanged": curves["agreement"]}
    if curves["accuracy"] is not None:
        sweep["answers right"] = curves["accuracy"]
    return [
        ("layer's input and output: cosine", {"vision": curves["vision_intra"], "text": curves["text_intra"]}),
        ("another image: cosine of instruction states", {"instruction": curves["cross"]}),
        (
            "attention lasts: ILVAS(l, l + n)",
            {f"n = {window}": line for window, line in curves["ilvas"].items()},
        ),
        ("no vision from this layer on", sweep),
    ]


def _mark(axis: Any, proposal: Proposal, num_layers: int) -> None:
    """Injection and exit at their layers; a filter between the layer it follows and the one that scores."""
    where = proposal.boundaries
    axis.axvline(where.inject_layer, color=INJECT_COLOUR, linewidth=1.2, label=f"inject {where.inject_layer}")
    if where.exit_layer <= num_layers:
        axis.axvline(where.exit_layer, color=EXIT_COLOUR, linewidth=1.2, label=f"exit {where.exit_layer}")
    label = f"filters {', '.join(map(str, proposal.filter_layers))}"
    for index, layer in enumerate(proposal.filter_layers):
        axis.axvline(layer + 0.5, color=FILTER_COLOUR, linewidth=1, linestyle=":", label=None if index else label)
