"""``hidrop bench train``: one training step with a schedule against the dense step."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress
from rich.table import Table

from vllm_hidrop.bench.shapes import SHAPES, random_model
from vllm_hidrop.config import make_method
from vllm_hidrop.methods import Method, ModelShape
from vllm_hidrop.outputs import write_file
from vllm_hidrop.plan.costs import request_costs
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import make_plan
from vllm_hidrop.plan.shapes import text_shape
from vllm_hidrop.terminal import Terminal

if TYPE_CHECKING:
    from vllm_hidrop.lab.train.step_cost import StepCost

MIB = 2**20
BACKWARD_AND_FORWARD = 3  # in forward passes: a backward pass costs two; the frozen tower has none


def run(
    shape: str,
    choice: tuple[str, str | None, dict[str, Any]],
    batch: int,
    text: int,
    runs: int,
    json_file: Path | None,
) -> None:
    """Measure, print, write ``json_file``. Raises ValueError: unknown shape, method, preset or option, or no fit."""
    from vllm_hidrop.lab.train.staged import check_trainable
    from vllm_hidrop.lab.train.step_cost import measure

    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    method = make_method(*choice)
    check_trainable(method)
    model = random_model(SHAPES[shape], "float32")
    num_vision = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    method.schedule(ModelShape(SHAPES[shape].num_layers, num_vision))
    ideal = ideal_ratio(model.config, method, num_vision, text)
    console = Terminal()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training steps", total=runs)
        dense, pruned = measure(model, method, batch, text, runs, lambda: progress.advance(task))
    found = figures(method.name, dense, pruned, ideal)
    try:
        console.show(_table(found, f"{batch} x (576 vision + {text} text) tokens, shape {shape!r}, bfloat16 autocast"))
    finally:  # a reader that left does not cost the file
        if json_file is not None:
            write_file(json_file, json.dumps(found, indent=2) + "\n")


def ideal_ratio(config: Any, method: Method, num_vision: int, text: int) -> float:
    """Dense FLOPs of a step over staged ones; optimiser and loss are left out."""
    from vllm_hidrop.models.llava import Llava

    shape = text_shape(config.text_config)
    schedule = method.schedule(ModelShape(shape.num_layers, num_vision))
    plan = make_plan(schedule, num_vision + text, [Span(1, num_vision)])
    costs = request_costs(shape, schedule, plan, method.signal, 32, Llava().vision_shape(config))
    tower = costs.encoder_flops or 0
    return (BACKWARD_AND_FORWARD * costs.dense_flops + tower) / (BACKWARD_AND_FORWARD * costs.flops + tower)


def figures(method: str, dense: "StepCost", pruned: "StepCost", ideal: float) -> dict[str, Any]:
    """The measurement as plain data; ``speedup`` is dense/pruned."""
    return {
        "method": method,
        "dense_seconds": dense.seconds,
        "seconds": pruned.seconds,
        "speedup": dense.seconds / pruned.seconds,
        "ideal_speedup": ideal,
        "dense_activation_bytes": dense.activation_bytes,
        "activation_bytes": pruned.activation_bytes,
    }


def _table(found: dict[str, Any], title: str) -> Table:
    table = Table("", "dense", found["method"], "ratio", "FLOP-ideal", title=title)
    seconds = found["dense_seconds"], found["seconds"]
    held = found["dense_activation_bytes"], found["activation_bytes"]
    speedup, ideal = f"{found['speedup']:.2f}x", f"{found['ideal_speedup']:.2f}x"
    table.add_row("seconds per step", *(f"{value:.2f}" for value in seconds), speedup, ideal)
    table.add_row("MiB held for backward", *(f"{v / MIB:.0f}" for v in held), f"{held[0] / held[1]:.2f}x", "")
    return table
