"""``hidrop plan``: what a schedule would cost one request, before anything is served.

Reads a model's configuration, never its weights. All numbers are arithmetic; none is measured.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_hidrop.config import HidropConfig, Resolved, resolve
from vllm_hidrop.methods import Adaptive, ModelShape
from vllm_hidrop.methods.visipruner import VisiPruner
from vllm_hidrop.plan import costs, shapes
from vllm_hidrop.plan.costs import RequestCosts, StageCosts
from vllm_hidrop.plan.paper_flops import PaperFlops, paper_flops
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import make_plan
from vllm_hidrop.plan.shapes import TextShape, VisionShape, text_shape, vision_shape
from vllm_hidrop.terminal import Terminal

EMBEDDED = "embedded"
FIXED_LAYERS = '{"filter_layer": 14, "keep": 10, "exit_layer": 23}'
"""Of VisiPruner on LLaVA-1.5-7B: what its 1.76 TFLOPs amount to, 10 tokens from the 16th to the 23rd layer."""


@dataclass(frozen=True)
class Model:
    """What planning needs of a checkpoint; ``trained`` is the ``hidrop`` entry of its configuration."""

    text: TextShape
    vision: VisionShape | None = None
    tokens_per_image: int | None = None
    trained: Mapping[str, Any] | None = None


SHAPES = {
    "7b": Model(shapes.LLAVA_7B, shapes.LLAVA_7B_VISION, 576),
    "13b": Model(shapes.LLAVA_13B, shapes.LLAVA_13B_VISION, 576),
}
"""LLaVA-1.5, known without any file."""


@dataclass(frozen=True)
class Workload:
    """One request: vision tokens of each image, text tokens, and the server's tokens per block."""

    images: tuple[int, ...]
    text: int
    block_size: int


def run(
    model: str, choice: Mapping[str, Any], images: Sequence[int], text: int, block_size: int, as_json: bool
) -> None:
    """Print the stages' costs: as a table, or as JSON with the same content.

    Args:
        model: "embedded", "7b", "13b", a directory or a hub name.
        choice: fields of :class:`HidropConfig`.
        images: vision tokens of each image; empty for one image of the model's own size.
        text: text tokens of the prompt, >= 1.
        block_size: tokens of a KV block.
        as_json: JSON instead of a table.

    Raises:
        ValueError: the model cannot be read, or the choice does not fit it.
    """
    known, resolved, workload, found = planned(model, choice, images, text, block_size)
    paper = paper_flops(known.text, found, resolved.method.name)
    if as_json:
        print(json.dumps(_as_json(model, resolved, workload, found, paper), indent=2))
    else:
        _print_table(model, resolved, workload, found, _paper_note(known.text, resolved, paper))


def planned(
    model: str, choice: Mapping[str, Any], images: Sequence[int], text: int, block_size: int
) -> tuple[Model, Resolved, Workload, RequestCosts]:
    """The model, its method, one request of it and that request's costs; arguments and errors as :func:`run`."""
    known = SHAPES.get(model) or read_model(model)
    if not images and known.tokens_per_image is None:
        raise ValueError(f"{model} does not say how many tokens an image has; give --images")
    workload = Workload(tuple(images) or (known.tokens_per_image or 0,), text, block_size)
    shape = ModelShape(known.text.num_layers, known.tokens_per_image or workload.images[0])
    resolved = resolve(HidropConfig.parse(choice), shape, known.trained)
    return known, resolved, workload, request_costs(known, resolved, workload)


def request_costs(
    model: Model, resolved: Resolved, workload: Workload, decided: Sequence[int] | None = None
) -> RequestCosts:
    """Costs of one request whose images come before its text.

    A method that decides how many tokens stay costs what its schedule bounds, or what it ``decided``: vision tokens of
    every stage, all images together.
    """
    spans, offset = [], 0
    for num_tokens in workload.images:
        spans.append(Span(offset, num_tokens))
        offset += num_tokens
    adaptive = isinstance(resolved.method, Adaptive)
    plan = make_plan(resolved.schedule, offset + workload.text, spans, adaptive=adaptive)
    if adaptive and decided is not None and spans:
        plan = replace(plan, kept=tuple(_split(count, len(spans)) for count in decided), decided=True)
    schedule, signal = resolved.schedule, resolved.method.signal
    return costs.request_costs(model.text, schedule, plan, signal, workload.block_size, model.vision)


def _split(count: int, parts: int) -> tuple[int, ...]:
    """A count over images as evenly as it goes; the towers' costs are per image."""
    return tuple(count // parts + (part < count % parts) for part in range(parts))


def read_model(model: str) -> Model:
    """Read shapes from a local directory or hub name.

    Raises:
        ValueError: there is no such model, or it has no text model of a known form.
    """
    from transformers import AutoConfig

    source = _embedded_directory() if model == EMBEDDED else model
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise ValueError(f"no such model directory: {source}")
    try:
        config = AutoConfig.from_pretrained(source)
        text = text_shape(config.get_text_config())
    except Exception as error:  # whatever file, hub or parser complains
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot read the shape of model {model!r}: {first_line}") from error
    vision = vision_shape(config, text) if config.model_type == "llava" else None
    tokens = getattr(config, "image_seq_length", None) or (vision.num_patches if vision else None)
    return Model(text, vision, tokens, getattr(config, "hidrop", None))


def _embedded_directory() -> str:
    try:
        from vllm_hidrop.embedded import MODEL_DIR
    except ImportError as error:
        raise ValueError("this installation has no embedded model") from error
    if not (Path(MODEL_DIR) / "config.json").is_file():
        raise ValueError("this installation has no embedded model")
    return str(MODEL_DIR)


def _as_json(
    model: str, resolved: Resolved, workload: Workload, found: RequestCosts, paper: PaperFlops
) -> dict[str, Any]:
    return {
        "model": model,
        "method": resolved.method.name,
        "preset": resolved.preset,
        "are_bounds": isinstance(resolved.method, Adaptive),
        **dataclasses.asdict(workload),
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
    images = " + ".join(str(num_tokens) for num_tokens in workload.images)
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


def _paper_note(shape: TextShape, resolved: Resolved, paper: PaperFlops) -> str:
    """The paper's own count, what it counts, and how to have it where layers are not fixed."""
    scale, unit = (1e12, "TFLOPs") if paper.dense_flops >= 1e12 else (1e9, "GFLOPs")
    note = (
        f"By the papers' formula for vision alone: {paper.flops / scale:.2f} of {paper.dense_flops / scale:.2f} {unit} "
        f"(multiply-adds, {paper.formula}; n vision tokens, d {shape.hidden_size}, m {shape.intermediate_size}"
    )
    if paper.quiet_layers:
        note += f"; 2 n^2 d not in the first {paper.quiet_layers} layers, as VisiPruner's appendix M"
    note += ")"
    if isinstance(resolved.method, VisiPruner) and None in (resolved.method.filter_layer, resolved.method.exit_layer):
        note += f"; VisiPruner's own figures are for fixed layers: --options '{FIXED_LAYERS}'"
    return note


def _cells(stage: StageCosts) -> tuple[str, ...]:
    return (
        str(stage.vision_tokens),
        _share(str(stage.rows), stage.rows, stage.dense_rows),
        _share(str(stage.kv_blocks), stage.kv_blocks, stage.dense_kv_blocks),
        _share(f"{stage.kv_bytes / 2**20:.2f}", stage.kv_bytes, stage.dense_kv_bytes),
        _share(f"{stage.flops / 1e9:.2f}", stage.flops, stage.dense_flops),
    )


def _total_cells(found: RequestCosts) -> tuple[str, ...]:
    mean_rows = found.row_layers / found.num_layers
    return (
        f"{found.vision_token_layers / found.num_layers:.1f}",
        _share(f"{mean_rows:.1f}", mean_rows, found.stages[0].dense_rows),
        _share(str(found.kv_blocks), found.kv_blocks, found.dense_kv_blocks),
        _share(f"{found.kv_bytes / 2**20:.2f}", found.kv_bytes, found.dense_kv_bytes),
        _share(f"{found.flops / 1e9:.2f}", found.flops, found.dense_flops),
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
