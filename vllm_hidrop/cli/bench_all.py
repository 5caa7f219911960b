"""``hidrop bench all``: every row that the documentation quotes, in an order that fails early."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rich.progress import Progress

from vllm_hidrop.bench.rows import Row
from vllm_hidrop.cli import bench_engines as engines
from vllm_hidrop.cli.bench import TOK48, Bench, complete_choice
from vllm_hidrop.cli.bench_serve import serve

NONE = complete_choice("none", None, {})
VISIPRUNER = complete_choice("visipruner", None, {})
MUSTDROP = complete_choice("mustdrop", None, {})
ADAPTIVE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bench", VISIPRUNER),
    ("bench-peaked", VISIPRUNER),
    ("bench", MUSTDROP),
)  # flat attention never makes VisiPruner cut; one peaked layer half way does
ALL_TRAFFIC = ("image", "off", "text")


def parts(bench: Bench) -> list[Callable[[Progress], list[Row]]]:
    """The measurements, in order; those that take long run less often than ``bench.runs``."""
    few, once, none = (replace(bench, runs=min(bench.runs, 3)), replace(bench, runs=1), replace(bench, hidrop=NONE))
    modes = (False, True) if bench.compiled else (False,)
    one_image = [replace(bench, compiled=False)] if bench.compiled else []
    one_image += [
        replace(bench, shape=shape if bench.shape == "bench" else bench.shape, hidrop=choice, compiled=compiled)
        for shape, choice in ADAPTIVE
        if bench.shape == "bench" or shape == "bench"
        for compiled in modes
    ]
    return [
        lambda p: engines.prefill(bench, (1,), (64,), ALL_TRAFFIC, p),
        lambda p: engines.prefill(bench, (1,), (32, 512), ("image",), p),
        lambda p: engines.prefill(bench, (2, 4, 8, 16), (64,), ("image",), p),
        *(lambda p, each=each: engines.prefill(each, (1,), (64,), ("image",), p) for each in one_image),
        lambda p: engines.prefill(none, (1,), (64,), ("image", "text"), p),
        lambda p: engines.burst(few, 16, 64, 2048, p),
        lambda p: engines.prefix(bench, 64, p),
        lambda p: engines.decode(bench, (1, 8, 16, 32), 64, ALL_TRAFFIC, p),
        lambda p: engines.decode(none, (1,), 64, ("image", "text"), p),
        lambda p: engines.kv(bench, (1, 4, 8), 64, 8, p),
        lambda p: engines.start(few, p),
        lambda p: serve(once, ALL_TRAFFIC, (48, 32, 8), p),
    ]


def measure_all(bench: Bench, progress: Progress) -> Iterator[Row]:
    """The rows of all parts, part by part."""
    assert bench.hidrop == TOK48
    for part in progress.track(parts(bench), description="everything"):
        yield from part(progress)
