"""``hidrop plan``: what a schedule would cost one request, calculated from the model's configuration alone."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_hidrop.cli.costing import Workload, planned
from vllm_hidrop.cli.media import Item
from vllm_hidrop.cli.options import Prompt
from vllm_hidrop.config import Resolved, provenance
from vllm_hidrop.methods import Adaptive
from vllm_hidrop.methods.visipruner import VisiPruner
from vllm_hidrop.plan.costs import RequestCosts, StageCosts
from vllm_hidrop.plan.paper_flops import PaperFlops, paper_flops
from vllm_hidrop.plan.shapes import TextShape
from vllm_hidrop.terminal import Terminal

FIXED_LAYERS = '{"filter_layer": 14, "keep": 10, "exit_layer": 23}'  # VisiPruner's 1.76 TFLOPs on LLaVA-1.5-7B


def run(model: str, choice: Mapping[str, Any], prompt: Prompt, block_size: int, as_json: bool) -> None:
    """Print the stages' costs as a table or as JSON with the same content; arguments and errors as :func:`planned`."""
    known, resolved, workload, found = planned(model, choice, prompt, block_size)
    paper = paper_flops(known.text, found, resolved.method.name)
    if as_json:
        origin = provenance(resolved, known.shape, known.trained)
        print(json.dumps(_as_json(model, resolved, workload, found, paper) | {"provenance": origin}, indent=2))
    else:
        _print_table(model, resolved, workload, found, _paper_note(known.text, resolved, paper))


def _as_json(
    model: str, resolved: Resolved, workload: Workload, found: RequestCosts, paper: PaperFlops
) -> dict[str, Any]:
    return {
        "model": model,
        "method": resolved.method.name,
        "preset": resolved.preset,
        "are_bounds": isinstance(resolved.method, Adaptive),
        "images": [item.frames[0] for item in workload.items if len(item.frames) == 1],
        "videos": [item.frames for item in workload.items if len(item.frames) > 1],
        "text": workload.text,
        "block_size": workload.block_size,
        "group_size": found.group_size,
        "stages": [dataclasses.asdict(stage) for stage in found.stages],
        "total": {
            "vision_token_layers": found.vision_token_layers,
            "mean_vision_tokens": found.vision_token_layers / found.num_layers,
            "row_layers": found.row_layers,
            "kv_blocks": found.kv_blocks,
            "dense_kv_blocks": found.dense_kv_blocks,
            "kv_bytes": found.kv_bytes,
            "dense_kv_bytes": found.dense_kv_bytes,
            "lm_head_flops": found.lm_head_flops,
            "flops": found.flops,
            "dense_flops": found.dense_flops,
            "encoder_flops": found.encoder_flops,
        },
        "paper": dataclasses.asdict(paper),
        "ideal_speedup": found.ideal_speedup,
        "ideal_speedup_with_encoder": found.ideal_speedup_with_encoder,
    }


def _print_table(model: str, resolved: Resolved, workload: Workload, found: RequestCosts, paper_note: str) -> None:
    preset = f" {resolved.preset}" if resolved.preset else ""
    images = " + ".join(_shown(item) for item in workload.items)
    table = Table(
        title=f"{resolved.method.name}{preset} on {model}: {images} vision and {workload.text} text tokens",
        caption="Percentages are of dense. Last row: mean per layer of vision and rows, sums of the rest.",
        box=SIMPLE_HEAD,
    )
    for heading in ("Stage", "Layers", "Vision", "Rows", "KV blocks", "KV MiB", "GFLOP"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, stage in enumerate(found.stages):
        table.add_row(str(index), f"{stage.first_layer}-{stage.end_layer - 1}", *_cells(stage))
    table.add_section()
    table.add_row("all", f"0-{found.num_layers - 1}", *_total_cells(found))
    console = Terminal()
    console.show(table)
    console.print(f"{_notes(workload, found)}\n{paper_note}", highlight=False, markup=False)
    if isinstance(resolved.method, Adaptive):
        console.print(
            f"{resolved.method.name} decides while a prompt runs how many tokens stay: these are upper bounds; "
            "what a request held is in its response.",
            highlight=False,
        )


def _shown(item: Item) -> str:
    frames = item.frames
    return str(frames[0]) if len(frames) == 1 else f"{len(frames)} x {frames[0]}"


def _paper_note(shape: TextShape, resolved: Resolved, paper: PaperFlops) -> str:
    """The FLOPs by the paper's own formula, the formula, and options that make VisiPruner's layers fixed."""
    scale, unit = (1e12, "TFLOPs") if paper.dense_flops >= 1e12 else (1e9, "GFLOPs")
    note = (
        f"By the papers' formula for vision alone: {paper.flops / scale:.2f} of {paper.dense_flops / scale:.2f} {unit} "
        f"(multiply-adds, {paper.formula}; n vision tokens, d {shape.hidden_size}, m {shape.active_size}"
    )
    if paper.quiet_layers:
        note += f"; 2 n^2 d not in the first {paper.quiet_layers} layers, as VisiPruner's appendix M"
    note += ")"
    if isinstance(resolved.method, VisiPruner) and None in (resolved.method.filter_layer, resolved.method.exit_layer):
        note += f"; VisiPruner's own figures are for fixed layers: --options '{FIXED_LAYERS}'"
    return note


def _cells(stage: StageCosts) -> tuple[str, ...]:
    vision, rows = str(stage.vision_tokens), str(stage.rows)
    return vision, _share(rows, stage.rows, stage.dense_rows), *_sums(stage)


def _total_cells(found: RequestCosts) -> tuple[str, ...]:
    vision, rows = found.vision_token_layers / found.num_layers, found.row_layers / found.num_layers
    return f"{vision:.1f}", _share(f"{rows:.1f}", rows, found.stages[0].dense_rows), *_sums(found)


def _sums(costs: StageCosts | RequestCosts) -> tuple[str, ...]:
    return (
        _share(str(costs.kv_blocks), costs.kv_blocks, costs.dense_kv_blocks),
        _share(f"{costs.kv_bytes / 2**20:.2f}", costs.kv_bytes, costs.dense_kv_bytes),
        _share(f"{costs.flops / 1e9:.2f}", costs.flops, costs.dense_flops),
    )


def _share(text: str, part: float, dense: float) -> str:
    return f"{text} {100 * part / dense:3.0f}%"


def _notes(workload: Workload, found: RequestCosts) -> str:
    lines = [
        f"One KV block: {workload.block_size} tokens of {found.group_size} layers. "
        f"LM head, in the sum only: {found.lm_head_flops / 1e9:.2f} GFLOP.",
        f"Ideal speed-up of prefill by FLOPs, text model: {found.ideal_speedup:.2f}",
    ]
    if found.encoder_flops is not None:
        lines.append(
            f"The same with vision tower and projector ({found.encoder_flops / 1e9:.2f} GFLOP): "
            f"{found.ideal_speedup_with_encoder:.2f}"
        )
    return "\n".join(lines)
