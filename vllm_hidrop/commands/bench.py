"""``hidrop bench``: prefill, decode and KV of ours against stock vLLM, from one run on the same weights."""

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_hidrop.bench.paired import Measured, Workload, engine_settings, running_pair
from vllm_hidrop.bench.shapes import SHAPES, make_checkpoint
from vllm_hidrop.commands import plan as planning
from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.methods import ModelShape

BLOCK_SIZE = 32
TOKENS_PER_IMAGE = 576
ADAPTIVE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bench", {"method": "visipruner", "options": {"scale": True}}),
    ("bench-peaked", {"method": "visipruner", "options": {"scale": True}}),
    ("bench", {"method": "mustdrop", "preset": "tok64", "options": {"scale": True}}),
)
"""Flat attention never makes VisiPruner cut; one peaked layer half way does."""
TOK48 = {"method": "hidrop", "preset": "tok48", "options": {"scale": True}}


@dataclass(frozen=True)
class Bench:
    """What all measurements of a run share.

    Attributes:
        shape: a name of ``bench.shapes.SHAPES``.
        runs: paired runs per figure.
        eager: ``enforce_eager`` for both engines; otherwise both compile, vLLM's default.
    """

    shape: str
    runs: int
    eager: bool

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}; known: {', '.join(SHAPES)}")

    def model(self) -> Path:
        """The checkpoint, made when it is missing."""
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm_hidrop"
        return make_checkpoint(SHAPES[self.shape], cache / f"bench-{self.shape}")


def run_prefill(bench: Bench, hidrop: dict[str, Any], images: int, text: int, json_file: Path | None) -> None:
    """Measure one prompt's prefill and print it; ``json_file`` gets the same."""
    with _progress() as progress:
        found = measure_prefill(bench, hidrop, images, text, progress)
    _print_rows([found])
    _write(json_file, found)


def run_all(bench: Bench, json_file: Path | None) -> None:
    """Measure every figure the documentation quotes: prefill in both modes, then what must not cost anything."""
    with _progress() as progress:
        rows = [measure_prefill(replace(bench, eager=eager), TOK48, 1, 64, progress) for eager in (True, False)]
        rows += [
            measure_prefill(replace(bench, shape=shape, eager=eager), choice, 1, 64, progress)
            for shape, choice in ADAPTIVE
            for eager in (True, False)
        ]
        rows += measure_overhead(bench, {"method": "none"}, "none", (1, 0), progress)
        rows += measure_overhead(bench, TOK48, "hidrop", (0,), progress)
    _print_rows(rows)
    model = f"random weights of shape {bench.shape!r} in bfloat16, {asdict(SHAPES[bench.shape])}"
    _write(json_file, {"model": model, "cpu": _cpu(), "date": str(date.today()), "rows": rows})


def _cpu() -> str:
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else "unknown CPU"


def measure_prefill(bench: Bench, hidrop: dict[str, Any], images: int, text: int, progress: Progress) -> dict[str, Any]:
    """One prompt of ``images`` images and ``text`` text tokens, vision tower included, in both engines."""
    model = bench.model()
    known = planning.read_model(str(model))
    resolved = resolve(HidropConfig.parse(hidrop), ModelShape(known.text.num_layers, TOKENS_PER_IMAGE))
    length = _model_len(images, text)
    stock = engine_settings(model, None, bench.eager, length)
    ours = engine_settings(model, hidrop, bench.eager, length)
    title = f"prefill, {images} images"
    with running_pair(stock, ours, progress) as pair:
        measured = pair.measure(Workload(images, text, max_tokens=2), bench.runs, progress, title)
    workload = planning.Workload((TOKENS_PER_IMAGE,) * images, text, BLOCK_SIZE)
    costs = planning.request_costs(known, resolved, workload, measured.kept)
    what = f"prefill {hidrop['method']} {images} image(s) + {text} text"
    if hidrop["method"] == "visipruner":
        what += f", {'no layer' if measured.cut_layer is None else f'layer {measured.cut_layer - 1}'} triggers"
    return _row(what, measured, bench) | {
        "kept": measured.kept,
        "cached": measured.cached,
        "selection_share": measured.selection_share,
        "ideal_speedup": costs.ideal_speedup_with_encoder,
        "ideal_speedup_text_model": costs.ideal_speedup,
        "share_of_ideal": measured.speedup / (costs.ideal_speedup_with_encoder or costs.ideal_speedup),
        "kv_blocks": measured.kv_blocks,
        "kv_blocks_planned": costs.kv_blocks,
        "kv_bytes": measured.kv_bytes(1),
        "kv_bytes_stock": measured.kv_bytes(0),
        "kv_share_of_stock": measured.kv_bytes(1) / measured.kv_bytes(0),
    }


def measure_overhead(
    bench: Bench, hidrop: dict[str, Any], name: str, images: tuple[int, ...], progress: Progress
) -> list[dict[str, Any]]:
    """Prompts that are not pruned: prefill and decode against stock, which should cost the same."""
    model = bench.model()
    length = _model_len(max(images), 64) + 64
    rows = []
    stock = engine_settings(model, None, bench.eager, length)
    with running_pair(stock, engine_settings(model, hidrop, bench.eager, length), progress) as pair:
        for count in images:
            title = f"{name}, {count} images"
            measured = pair.measure(Workload(count, 64, max_tokens=17), bench.runs, progress, title)
            what = f"{name}, {count} image(s)" if count else f"{name}, text only"
            rows.append(_row(f"prefill {what}", measured, bench))
            rows.append(_decode_row(f"decode step {what}", measured, bench))
    return rows


def _row(name: str, measured: Measured, bench: Bench) -> dict[str, Any]:
    return _timings(name, measured.seconds(0), measured.seconds(1), bench)


def _decode_row(name: str, measured: Measured, bench: Bench) -> dict[str, Any]:
    return _timings(name, measured.decode_seconds(0), measured.decode_seconds(1), bench)


def _timings(name: str, stock: float, ours: float, bench: Bench) -> dict[str, Any]:
    return {
        "name": name,
        "speedup": stock / ours,
        "stock_seconds": stock,
        "staged_seconds": ours,
        "settings": asdict(bench),
        "versions": _versions(),
    }


def _versions() -> dict[str, Any]:
    import platform

    import torch

    from vllm_hidrop import __version__
    from vllm_hidrop.engine.compat import installed_vllm_version

    return {
        "vllm_hidrop": __version__,
        "vllm": installed_vllm_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def _model_len(images: int, text: int) -> int:
    return -(-(images * TOKENS_PER_IMAGE + text + 1) // 256) * 256


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


def _print_rows(rows: list[dict[str, Any]]) -> None:
    headings = ("stock ms", "ours ms", "speed-up", "ideal", "of ideal", "selection", "KV blocks (plan)", "KV of stock")
    table = Table("what", *headings)
    for row in rows:
        table.add_row(
            row["name"],
            f"{1000 * row['stock_seconds']:.1f}",
            f"{1000 * row['staged_seconds']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['ideal_speedup']:.2f}x" if "ideal_speedup" in row else "",
            f"{row['share_of_ideal']:.0%}" if "share_of_ideal" in row else "",
            f"{row['selection_share']:.1%}" if "selection_share" in row else "",
            f"{row['kv_blocks']} ({row['kv_blocks_planned']})" if "kv_blocks" in row else "",
            f"{row['kv_share_of_stock']:.1%}" if "kv_share_of_stock" in row else "",
        )
    Console(width=140).print(table)


def _write(json_file: Path | None, found: dict[str, Any]) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
