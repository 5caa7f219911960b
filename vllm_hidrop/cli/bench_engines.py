"""The sections of ``hidrop bench`` that drive two engines on the same weights, each in a process of its own."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from rich.progress import Progress

from vllm_hidrop.bench.paired import EngineProcess, Measured, Pair, Workload, running_pair
from vllm_hidrop.bench.rows import Row, make_row
from vllm_hidrop.cli.bench import BLOCK_SIZE, Bench, finished
from vllm_hidrop.methods import Adaptive
from vllm_hidrop.plan.costs import ideal_decode_ratio

NEW_PICTURES = 1_000_000  # a first seed above those that ``EngineProcess.start`` counts up from 1


def _over_pairs(
    bench: Bench,
    settings: tuple[dict[str, Any], dict[str, Any]],
    progress: Progress,
    measure: Callable[[Pair], list[Row]],
) -> list[Row]:
    found = []
    for _ in range(bench.pairs):
        with running_pair(*settings, progress) as pair:
            found.append(measure(pair))
    return finished(bench, found)


def _model_len(bench: Bench, images: int, text: int, generated: int = 8) -> int:
    """Tokens of a prompt and its answer in whole blocks; vLLM's profile wants some text with every image."""
    return -(-(images * bench.tokens_per_image + text + generated) // BLOCK_SIZE) * BLOCK_SIZE


def prefill(
    bench: Bench, images: Sequence[int], texts: Sequence[int], traffic: Sequence[str], progress: Progress
) -> list[Row]:
    """Prefill times of every number of images with every length of text (traffic "text": lengths only)."""
    length = _model_len(bench, max(images), max(texts))
    cells = [(kind, count, text) for kind in traffic for count in ([0] if kind == "text" else images) for text in texts]

    def measure(pair: Pair) -> list[Row]:
        return [_prefill_row(bench, pair, *cell, progress) for cell in cells]

    return _over_pairs(bench, bench.settings(length, length, bench.kv_bytes(length)), progress, measure)


def _prefill_row(bench: Bench, pair: Pair, traffic: str, images: int, text: int, progress: Progress) -> Row:
    what = (f"{images} image{'s' if images > 1 else ''} + " if images else "") + f"{text} text"
    runs = max(min(bench.runs, 3), bench.runs // max(images, 1))
    workload = Workload(images, text, off=traffic == "off")
    name = bench.name("prefill", traffic, what)
    measured = pair.measure(workload, runs, progress, name)
    command = bench.command("prefill", images=images or 1, text=text, traffic=traffic)
    times = _milliseconds(measured)
    if traffic != "image":
        return make_row("prefill", name, times, "ms", 1.0, command=command)
    if bench.method == "visipruner":
        cut = measured.cut_layer
        name += f", {'no layer' if cut is None else f'layer {cut - 1}'} triggers"
    costs = bench.costs(images, text, measured.kept)
    more = {
        "kept": measured.kept,
        "cached": measured.cached,
        "selection_share": measured.selection_share,
        "kv_blocks": measured.kv_blocks,
        "kv_blocks_planned": costs.kv_blocks,
    }
    return make_row("prefill", name, times, "ms", costs.ideal_speedup_with_encoder, command=command, **more)


def _milliseconds(measured: Measured) -> tuple[float, float]:
    return 1000 * measured.seconds(0), 1000 * measured.seconds(1)


def decode(bench: Bench, batches: Sequence[int], text: int, traffic: Sequence[str], progress: Progress) -> list[Row]:
    """Times of a decode step at every batch size, one image per request or none; the ideal is in bytes read."""
    length = _model_len(bench, 1, text, generated=200 + 10 * bench.runs)
    is_adaptive = isinstance(bench.resolved.method, Adaptive)

    def row(pair: Pair, kind: str, batch: int) -> Row:
        workload = Workload(0 if kind == "text" else 1, text, batch, kind == "off")
        name = bench.name("decode", kind, f"batch {batch}")
        stock, ours = pair.decode_seconds(workload, bench.runs, progress, name)
        ideal: float | None = 1.0
        if kind == "image":
            ideal = None if is_adaptive else ideal_decode_ratio(bench.known.text, bench.costs(1, text), batch)
        command = bench.command("decode", batch=batch, text=text, traffic=kind)
        return make_row("decode", name, (1000 * stock, 1000 * ours), "ms", ideal, command=command)

    def measure(pair: Pair) -> list[Row]:
        return [row(pair, kind, batch) for kind in traffic for batch in batches]

    room = bench.kv_bytes(max(batches) * length)
    settings = bench.settings(length, max(4096, length), room, max_num_seqs=max(batches))
    return _over_pairs(bench, settings, progress, measure)


def kv(bench: Bench, images: Sequence[int], text: int, pool: int, progress: Progress) -> list[Row]:
    """Bytes a prompt holds; requests a pool for ``pool`` of stock's holds. Raises ValueError: a prompt exceeds it."""
    if max(images) > pool:
        raise ValueError(f"--images {max(images)} does not fit a pool for {pool} requests: raise --pool")
    length = _model_len(bench, max(images), text)
    costs = bench.costs(1, text)
    a_block = BLOCK_SIZE * bench.known.text.num_layers * bench.known.text.kv_bytes_per_row
    # A prompt and the block of its first answer tokens; vLLM keeps one block to itself.
    pool_bytes = a_block * (pool * (costs.stages[0].dense_layer_blocks // costs.stages[0].num_layers + 1) + 1)
    ideal = costs.dense_kv_token_bytes / costs.kv_token_bytes
    count = math.ceil(pool * ideal) + 4

    def measure(pair: Pair) -> list[Row]:
        rows = [_held_row(bench, pair, number, text) for number in images]
        bar = progress.add_task(f"filling a pool of {pool_bytes / 2**20:.0f} MiB", total=2)
        held = []
        for engine in (pair.stock, pair.ours):
            held.append(engine.run(Workload(1, text, count))["num_held"])
            progress.advance(bar)
        name = bench.name("kv", "image", "requests held")
        command = bench.command("kv", images=1, text=text, pool=pool)
        figures = (held[0], held[1])
        return [*rows, make_row("kv", name, figures, "requests", ideal, command=command, pool_bytes=pool_bytes)]

    settings = bench.settings(length, max(2048, length), pool_bytes, max_num_seqs=count)
    return _over_pairs(bench, settings, progress, measure)


def _held_row(bench: Bench, pair: Pair, images: int, text: int) -> Row:
    """MiB of the blocks held after prefill; the ideal holds exactly the tokens of the plan."""
    stock, ours = (engine.run(Workload(images, text)) for engine in (pair.stock, pair.ours))
    decided = [stage["kept"] for stage in ours["report"]["stages"]]
    costs = bench.costs(images, text, decided)
    held = (stock["kv_blocks"] * pair.stock.kv_bytes_per_block, ours["kv_blocks"] * pair.ours.kv_bytes_per_block)
    name = bench.name("kv", "image", f"bytes held, {images} image{'s' if images > 1 else ''} + {text} text")
    return make_row(
        "kv",
        name,
        (held[0] / 2**20, held[1] / 2**20),
        "MiB",
        held[0] / costs.kv_token_bytes,
        command=bench.command("kv", images=images, text=text),
        kv_blocks=ours["kv_blocks"],
        kv_blocks_planned=costs.kv_blocks,
        over_token_exact=held[1] / costs.kv_token_bytes,
    )


def burst(bench: Bench, requests: int, text: int, budget: int, progress: Progress) -> list[Row]:
    """Time until requests sent at once have first tokens. Raises ValueError: a prompt exceeds the step ``budget``."""
    length = _model_len(bench, 1, text, generated=256)
    if budget < length:
        raise ValueError(f"--budget {budget} is less than the {length} tokens of a prompt and its answer")
    name = bench.name("burst", "image", f"{requests} requests, {budget} tokens a step")

    def measure(pair: Pair) -> list[Row]:
        measured = pair.measure(Workload(1, text, requests), min(bench.runs, 5), progress, name)
        times, steps = _milliseconds(measured), (measured.num_steps(0), measured.num_steps(1))
        ideal = bench.costs(1, text).ideal_speedup_with_encoder
        command = bench.command("burst", requests=requests, text=text, budget=budget)
        return [make_row("burst", name, times, "ms", ideal, command=command, steps=steps)]

    settings = bench.settings(length, budget, bench.kv_bytes(requests * length), max_num_seqs=requests)
    return _over_pairs(bench, settings, progress, measure)


def prefix(bench: Bench, text: int, progress: Progress) -> list[Row]:
    """Times of a question about a new image and of a second one about it; both engines may cache prefixes."""
    length = _model_len(bench, 1, text)
    workload = Workload(1, text)

    def measure(pair: Pair) -> list[Row]:
        seconds: dict[tuple[bool, int], list[float]] = {(ours, n): [] for ours in (False, True) for n in (0, 1)}
        warm_ups = 2
        for turn in progress.track(range(bench.runs + warm_ups), description="two questions about an image"):
            for engine in pair.in_turn(turn):
                engine.run(workload)
                for question in (0, 1):
                    reply = engine.run(workload, picture_seed=NEW_PICTURES + turn)
                    if turn >= warm_ups:
                        seconds[engine.is_ours, question].append(sum(reply["step_seconds"]))
        rows = []
        for question, called in enumerate(("first question", "second question")):
            stock, ours = (1000 * median(seconds[who, question]) for who in (False, True))
            name, command = bench.name("prefix", "image", called), bench.command("prefix", text=text)
            ideal = None if question else bench.costs(1, text).ideal_speedup_with_encoder
            rows.append(make_row("prefix", name, (stock, ours), "ms", ideal, command=command))
        return rows

    settings = bench.settings(length, max(2048, length), bench.kv_bytes(64 * length), prefix_caching=True)
    return _over_pairs(bench, settings, progress, measure)


def start(bench: Bench, progress: Progress) -> list[Row]:
    """Seconds from a new process to an engine that takes requests; the first start of each engine is discarded."""
    length = _model_len(bench, 1, 64)
    settings = bench.settings(length, 2048, bench.kv_bytes(8 * length))
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in progress.track(range(bench.runs + 1), description="starting engines"):
        for who in (0, 1) if turn % 2 else (1, 0):
            with EngineProcess(settings[who]) as engine:
                engine.wait_until_ready()
                seconds[who].extend([engine.start_seconds] if turn else [])
    name = "engine start" + ("" if bench.compiled else ", eager")
    figures = (median(seconds[0]), median(seconds[1]))
    return finished(bench, [[make_row("start", name, figures, "s", None, command=bench.command("start"))]])
