"""``hidrop bench``: names, options and help; the work is in this folder's other files."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_hidrop.cli.options import Options, grouped, output_file, parse_counts, parse_names
from vllm_hidrop.json_text import parse_object

if TYPE_CHECKING:
    from rich.progress import Progress

    from vllm_hidrop.cli.bench import Bench

bench_app = typer.Typer(help="Measure ours against stock vLLM on the same random weights.", no_args_is_help=True)

MOST_RUNS, MOST_TEXT = 1000, 8192
TRAFFIC = ("image", "off", "text")

Shape = Annotated[
    str, typer.Option(help='Size of the random-weight model: "tiny", "bench", "qwen" (a Qwen2.5-VL), "2.7b" or "7b".')
]
Runs = Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="Paired runs per figure; the median counts.")]
Pairs = Annotated[
    int, typer.Option(min=1, max=MOST_RUNS, help="Fresh pairs of processes; the median of their medians counts.")
]
Method = Annotated[str, typer.Option(help="Pruning method.")]
Traffic = Annotated[
    str, typer.Option(help='Of "image" (pruned), "off" (images, everything kept), "text" (no image), by comma.')
]
Text = Annotated[int, typer.Option(min=2, max=MOST_TEXT, help="Text tokens of a prompt.")]
Images = Annotated[str, typer.Option(help="Images of a prompt, 1 to 16; several by comma.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", callback=output_file, help="Also write the rows to this file.")
]


@dataclass(frozen=True)
class Pruning:
    """What ours prunes by; the random weights were trained for no schedule."""

    method: Method = "hidrop"
    preset: Annotated[
        str | None, typer.Option(help="Named schedule of the method (hidrop: tok48, mustdrop: tok64; scaled).")
    ] = None
    options: Options = "{}"


@dataclass(frozen=True)
class Setup:
    """The settings that both engines share, and the files that rows are written to."""

    shape: Shape = "bench"
    compiled: Annotated[
        bool, typer.Option("--compiled/--eager", help="Both engines compile, as vLLM does, or neither.")
    ] = True
    json_file: JsonFile = None
    png_file: Annotated[
        Path | None, typer.Option("--png", callback=output_file, help="Draw the rows to this file.")
    ] = None


def _report(
    rows: "Callable[[Bench, Progress], Iterable[dict[str, Any]]]",
    pruning: Pruning,
    setup: Setup,
    runs: int = 1,
    pairs: int = 1,
) -> None:
    from vllm_hidrop.cli.bench import Bench, complete_choice, report

    choice = complete_choice(pruning.method, pruning.preset, parse_object(pruning.options, "--options"))
    bench = Bench(setup.shape, runs, pairs, setup.compiled, choice)
    report(bench, lambda progress: rows(bench, progress), setup.json_file, setup.png_file)


@bench_app.command()
@grouped
def prefill(
    pruning: Pruning,
    setup: Setup,
    images: Images = "1,2,4,8,16",
    text: Annotated[str, typer.Option(help="Text tokens of a prompt; several by comma.")] = "64",
    traffic: Traffic = "image",
    runs: Runs = 15,
    pairs: Pairs = 1,
) -> None:
    """Time one prompt's prefill, vision tower included; the ideal is the ratio of FLOPs."""
    from vllm_hidrop.cli import bench_engines as command

    counts = parse_counts(images, "--images", 1, 16)
    lengths, kinds = parse_counts(text, "--text", 2, MOST_TEXT), parse_names(traffic, "--traffic", TRAFFIC)
    _report(lambda b, p: command.prefill(b, counts, lengths, kinds, p), pruning, setup, runs, pairs)


@bench_app.command()
@grouped
def decode(
    pruning: Pruning,
    setup: Setup,
    batch: Annotated[str, typer.Option(help="Requests in a step, 1 to 256; several by comma.")] = "1,2,4,8,16,32",
    text: Text = 64,
    traffic: Traffic = "image,off,text",
    runs: Runs = 15,
    pairs: Pairs = 1,
) -> None:
    """Time a decode step of concurrent requests with one image each, or none; the ideal is the ratio of bytes read."""
    from vllm_hidrop.cli import bench_engines as command

    batches, kinds = parse_counts(batch, "--batch", 1, 256), parse_names(traffic, "--traffic", TRAFFIC)
    _report(lambda b, p: command.decode(b, batches, text, kinds, p), pruning, setup, runs, pairs)


@bench_app.command()
@grouped
def kv(
    pruning: Pruning,
    setup: Setup,
    images: Images = "1,4,8",
    text: Text = 64,
    pool: Annotated[int, typer.Option(min=1, max=256, help="Requests of stock vLLM that the pool just holds.")] = 8,
    pairs: Pairs = 1,
) -> None:
    """Count the blocks a prompt holds, and the requests that a pool of fixed bytes holds until one must wait."""
    from vllm_hidrop.cli import bench_engines as command

    counts = parse_counts(images, "--images", 1, 16)
    _report(lambda b, p: command.kv(b, counts, text, pool, p), pruning, setup, pairs=pairs)


@bench_app.command()
@grouped
def burst(
    pruning: Pruning,
    setup: Setup,
    requests: Annotated[int, typer.Option(min=2, max=256, help="One-image requests that arrive at once.")] = 16,
    text: Text = 64,
    budget: Annotated[int, typer.Option(min=1, max=2**20, help="max_num_batched_tokens of both engines.")] = 2048,
    runs: Runs = 3,
    pairs: Pairs = 1,
) -> None:
    """Time requests that arrive at once until each has its first token."""
    from vllm_hidrop.cli import bench_engines as command

    _report(lambda b, p: command.burst(b, requests, text, budget, p), pruning, setup, runs, pairs)


@bench_app.command()
@grouped
def prefix(pruning: Pruning, setup: Setup, text: Text = 64, runs: Runs = 15, pairs: Pairs = 1) -> None:
    """Time a question about a new image and another about the same one, prefix caching on."""
    from vllm_hidrop.cli import bench_engines as command

    _report(lambda b, p: command.prefix(b, text, p), pruning, setup, runs, pairs)


@bench_app.command()
@grouped
def serve(
    pruning: Pruning,
    setup: Setup,
    traffic: Traffic = "image,off,text",
    requests: Annotated[int, typer.Option(min=2, max=10_000, help="Requests of a load.")] = 48,
    output_tokens: Annotated[int, typer.Option(min=2, max=256, help="Tokens of an answer.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time where latency counts.")] = 8,
    runs: Runs = 1,
    pairs: Pairs = 1,
) -> None:
    """Load both servers over HTTP by vLLM's own benchmark: requests/s with all requests at once, then latencies."""
    from vllm_hidrop.cli import bench_serve as command

    kinds, sizes = parse_names(traffic, "--traffic", TRAFFIC), (requests, output_tokens, concurrency)
    _report(lambda b, p: command.serve(b, kinds, sizes, p), pruning, setup, runs, pairs)


@bench_app.command()
@grouped
def start(pruning: Pruning, setup: Setup, runs: Runs = 3) -> None:
    """Time the start of an engine process, compiler caches warm."""
    from vllm_hidrop.cli import bench_engines as command

    _report(command.start, pruning, setup, runs)


@bench_app.command()
@grouped
def train(
    batch: Annotated[int, typer.Option(min=1, max=256, help="Prompts of a step, one image each.")] = 2,
    text: Annotated[int, typer.Option(min=20, max=MOST_TEXT, help="Text tokens of a prompt.")] = 64,
    method: Method = "hidrop",
    preset: Annotated[str | None, typer.Option(help="Named schedule (hidrop: tok64, scaled).")] = None,
    options: Options = "{}",
    shape: Shape = "bench",
    runs: Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="Paired steps.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Time one training step with a schedule against the dense step, and the memory each holds."""
    from vllm_hidrop.cli import bench_train as command

    chosen = parse_object(options, "--options")
    if method == "hidrop":
        preset, chosen = preset or "tok64", {"scale": True} | chosen
    command.run(shape, (method, preset, chosen), batch, text, runs, json_file)


@bench_app.command("all")
@grouped
def bench_all(setup: Setup, runs: Runs = 15, pairs: Pairs = 1) -> None:
    """Every row the documentation quotes, HiDrop tok48 scaled; compiled, and one image eager too."""
    from vllm_hidrop.cli.bench_all import measure_all

    _report(measure_all, Pruning(), setup, runs, pairs)
