"""``python -m scripts.figure`` draws docs/stages.png and docs/request.png, with the numbers they show as metadata."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vllm_hidrop.cli.costing import planned
from vllm_hidrop.cli.options import Prompt
from vllm_hidrop.config import make_method
from vllm_hidrop.methods import ModelShape

DOCS = Path(__file__).parents[1] / "docs"
SHAPE = ModelShape(32, 576)
METHOD, PRESET = "hidrop", "tok64"
BESIDE = (("fastv", "FastV"), ("pyramiddrop", "PyramidDrop"))
NUM_TEXT, BLOCK_SIZE = 64, 32
OURS, STOCK, TEXT, INK = "#3b6ea5", "#dfe3e8", "#d98324", "#22272e"


def kept_per_layer(name: str, preset: str | None = None) -> list[int]:
    """Vision tokens of one image in every layer of LLaVA-1.5-7B."""
    schedule = make_method(name, preset).schedule(SHAPE)
    kept = schedule.kept(SHAPE.tokens_per_image)
    return [kept[schedule.stage_of_layer(layer)] for layer in range(SHAPE.num_layers)]


def stages_data() -> dict[str, list[int]]:
    """Vision tokens per layer of each method in stages.png."""
    return {METHOD: kept_per_layer(METHOD, PRESET)} | {name: kept_per_layer(name) for name, _ in BESIDE}


def request_data() -> list[dict[str, int]]:
    """The stages of one request, as request.png shows them, by the arithmetic of ``hidrop plan``."""
    _, _, _, costs = planned("7b", {"method": METHOD, "preset": PRESET}, Prompt(text=NUM_TEXT), BLOCK_SIZE)
    return [
        {
            "first_layer": stage.first_layer,
            "end_layer": stage.end_layer,
            "vision": stage.vision_tokens,
            "rows": stage.rows,
            "kv_blocks": stage.kv_blocks,
            "dense_kv_blocks": stage.dense_kv_blocks,
        }
        for stage in costs.stages
    ]


def shown_in(file: Path) -> Any:
    """The numbers that one of these pictures was drawn from; a test compares them with today's."""
    with Image.open(file) as picture:
        return json.loads(picture.info["Description"])


def _tidy(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(0, SHAPE.num_layers)
    axis.set_xticks(range(0, SHAPE.num_layers + 1, 8))


def _steps(axis: Axes, heights: Sequence[float], edges: Sequence[int], colour: str) -> None:
    axis.stairs(heights, edges, fill=True, color=colour, linewidth=0)


def draw_stages(data: dict[str, list[int]]) -> Figure:
    """Draw HiDrop large, with the names of its four parts, and two other methods small."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.1), sharey=True, layout="constrained", width_ratios=(2.2, 1, 1))
    for axis, (name, shown) in zip(axes, ((METHOD, f"HiDrop {PRESET}"), *BESIDE), strict=True):
        edges = range(SHAPE.num_layers + 1)
        _steps(axis, [SHAPE.tokens_per_image] * SHAPE.num_layers, edges, STOCK)
        _steps(axis, data[name], edges, OURS)
        _tidy(axis, f"{shown}: mean {sum(data[name]) / SHAPE.num_layers:.0f}")
        axis.set_xlabel("decoder layer")
    axes[0].set_ylabel("vision tokens of one image\n(grey: stock vLLM)")
    axes[0].set_ylim(0, 640)
    kept = data[METHOD]
    firsts = [layer for layer in range(SHAPE.num_layers) if layer == 0 or kept[layer] != kept[layer - 1]]
    ends = [*firsts[1:], SHAPE.num_layers]
    for first, end in zip(firsts, ends, strict=True):
        axes[0].text((first + end) / 2, kept[first] + 8, f"{kept[first]}", ha="center", fontsize=9, color=INK)
    inject, leave = firsts[1], firsts[-1]
    for left, right, words in (
        (0, inject, "late injection:\nno image yet"),
        (ends[1], leave, "concave pyramid:\nwhat the question\nattends to"),
        (leave, SHAPE.num_layers, "early exit:\nimage has\nbeen read"),
    ):
        axes[0].text((left + right) / 2, 380, words, ha="center", va="center", fontsize=9, color=INK)
    return figure


def draw_request(data: list[dict[str, int]]) -> Figure:
    """Draw the rows that every layer runs, and below them the KV blocks that every stage holds."""
    figure, (rows, blocks) = plt.subplots(2, 1, figsize=(11, 5.2), sharex=True, layout="constrained")
    dense = SHAPE.tokens_per_image + NUM_TEXT
    edges = [*(stage["first_layer"] for stage in data), SHAPE.num_layers]
    widths = [stage["end_layer"] - stage["first_layer"] for stage in data]
    _steps(rows, [dense] * len(data), edges, STOCK)
    _steps(rows, [stage["rows"] for stage in data], edges, OURS)
    _steps(rows, [NUM_TEXT] * len(data), edges, TEXT)
    per_layer = [stage["kv_blocks"] / width for stage, width in zip(data, widths, strict=True)]
    _steps(blocks, [stage["dense_kv_blocks"] / width for stage, width in zip(data, widths, strict=True)], edges, STOCK)
    _steps(blocks, per_layer, edges, OURS)
    for stage, height in zip(data, per_layer, strict=True):
        middle = (stage["first_layer"] + stage["end_layer"]) / 2
        rows.text(middle, stage["rows"] + 10, f"{stage['rows']}", ha="center", fontsize=9)
        blocks.text(middle, height + 0.15, f"{stage['kv_blocks']}", ha="center", fontsize=9)
    rows.set_ylim(0, 720)
    blocks.set_ylim(0, 11.5)
    _tidy(
        rows,
        f"Rows that a layer runs in the prefill: {NUM_TEXT} of text (orange), the rest vision; grey: stock, {dense}",
    )
    held, of = (sum(stage[key] for stage in data) for key in ("kv_blocks", "dense_kv_blocks"))
    _tidy(blocks, f"KV blocks per layer; numbers: of the whole stage, {held} in all, grey: stock, {of}")
    for stage in data[1:]:
        rows.axvline(stage["first_layer"], color=INK, linewidth=0.6, linestyle=":")
    _mark_cuts(rows, data)
    blocks.set_xlabel("decoder layer")
    return figure


def _mark_cuts(axis: Axes, data: list[dict[str, int]]) -> None:
    inject, first_cut, leave = data[1], data[2], data[-1]
    for stage, words, place in (
        (inject, f"inject {inject['vision']}", (2.2, 560)),
        (first_cut, f"score under layer {first_cut['first_layer']}, keep {first_cut['vision']}", (14.5, 560)),
        (leave, "drop the rest", (27.5, 300)),
    ):
        target = (stage["first_layer"], place[1])
        axis.annotate(words, target, place, fontsize=9, va="center", ha="center", arrowprops={"arrowstyle": "->"})


def main() -> None:
    """Draw both pictures."""
    mpl.use("Agg")
    stages, request = stages_data(), request_data()
    for name, figure, data in (
        ("stages.png", draw_stages(stages), stages),
        ("request.png", draw_request(request), request),
    ):
        figure.savefig(DOCS / name, dpi=160, metadata={"Description": json.dumps(data)})


if __name__ == "__main__":
    main()
