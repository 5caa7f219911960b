"""``hidrop bench``: names, options and help; the work is in this folder's other files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_hidrop.cli.options import output_file, parse_counts, parse_names
from vllm_hidrop.json_text import parse_object

if TYPE_CHECKING:
    from vllm_hidrop.cli.bench import Bench

bench_app = typer.Typer(help="Measure ours against stock vLLM on the same random weights.", no_args_is_help=True)

MOST_RUNS, MOST_TEXT = 1000, 8192

Shape = Annotated[str, typer.Option(help='Size of the random-weight model: "tiny", "bench", "2.7b" or "7b".')]
Runs = Annotated[int, typer.Option(min=1, max=MOST_RUNS, help="Paired runs per figure; the median counts.")]
Pairs = Annotated[
    int, typer.Option(min=1, max=MOST_RUNS, help="Fresh pairs of processes; the median of their medians counts.")
]
Compiled = Annotated[bool, typer.Option("--compiled/--eager", help="Both engines compile, as vLLM does, or neither.")]
Method = Annotated[str, typer.Option(help="Pruning method.")]
Preset = Annotated[
    str | None, typer.Option(help="Named schedule of the method (hidrop: tok48, mustdrop: tok64; scaled).")
]
Options = Annotated[str, typer.Option(help="The method's options, a JSON object.")]
Traffic = Annotated[
    str, typer.Option(help='Of "image" (pruned), "off" (images, everything kept), "text" (no image), by comma.')
]
Text = Annotated[int, typer.Option(min=2, max=MOST_TEXT, help="Text tokens of a prompt.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", callback=output_file, help="Also write the rows to this file.")
]
PngFile = Annotated[Path | None, typer.Option("--png", callback=output_file, help="Draw the rows to this file.")]
TRAFFIC = ("image", "off", "text")


def _bench(shape: str, runs: int, pairs: int, compiled: bool, choice: tuple[str, str | None, str]) -> "Bench":
    from vllm_hidrop.cli.bench import Bench, complete_choice

    method, preset, options = choice
    return Bench(shape, runs, pairs, compiled, complete_choice(method, preset, parse_object(options, "--options")))


@bench_app.command()
def prefill(  # noqa: PLR0913, PLR0917 (one argument is one option)
    images: Annotated[str, typer.Option(help="Images of a prompt, 1 to 16; several by comma.")] = "1,2,4,8,16",
    text: Annotated[str, typer.Option(help="Text tokens of a prompt; several by comma.")] = "64",
    traffic: Traffic = "image",
    method: Method = "hidrop",
    preset: Preset = None,
    options: Options = "{}",
    shape: Shape = "bench",
    runs: Runs = 15,
    pairs: Pairs = 1,
    compiled: Compiled = True,
    json_file: JsonFile = None,
    png_file: PngFile = None,
) -> None:
    """Time one prompt's prefill, vision tower included; the ideal is the ratio of FLOPs."""
    from vllm_hidrop.cli import bench as command

    bench = _bench(shape, runs, pairs, compiled, (method, preset, options))
    counts = parse_counts(images, "--images", 1, 16)
    lengths, kinds = parse_counts(text, "--text", 2, MOST_TEXT), parse_names(traffic, "--traffic", TRAFFIC)
    command.report(bench, lambda p: command.prefill(bench, counts, lengths, kinds, p), json_file, png_file)


@bench_app.command()
def decode(  # noqa: PLR0913, PLR0917 (one argument is one option)
    batch: Annotated[str, typer.Option(help="Requests in a step, 1 to 256; several by comma.")] = "1,2,4,8,16,32",
    text: Text = 64,
    traffic: Traffic = "image,off,text",
    method: Method = "hidrop",
    preset: Preset = None,
    options: Options = "{}",
    shape: Shape = "bench",
    runs: Runs = 15,
    pairs: Pairs = 1,
    compiled: Compiled = True,
    json_file: JsonFile = None,
    png_file: PngFile = None,
) -> None:
    """Time a decode step of concurrent requests with one image each, or none; the ideal is the ratio of bytes read."""
    from vllm_hidrop.cli import bench as command

    bench = _bench(shape, runs, pairs, compiled, (method, preset, options))
    batches, kinds = parse_counts(batch, "--batch", 1, 256), parse_names(traffic, "--traffic", TRAFFIC)
    command.report(bench, lambda p: command.decode(bench, batches, text, kinds, p), json_file, png_file)


@bench_app.command()
def kv(  # noqa: PLR0913, PLR0917 (one argument is one option)
    images: Annotated[str, typer.Option(help="Images of a prompt, 1 to 16; several by comma.")] = "1,4,8",
    text: Text = 64,
    pool: Annotated[int, typer.Option(min=1, max=256, help="Requests of stock vLLM that the pool just holds.")] = 8,
    method: Method = "hidrop",
    preset: Preset = None,
    options: Options = "{}",
    shape: Shape = "bench",
    pairs: Pairs = 1,
    compiled: Compiled = True,
    json_file: JsonFile = None,
    png_file: PngFile = None,
) -> None:
    """Count the blocks a prompt holds, and the requests that a pool of fixed bytes holds until one must wait."""
    from vllm_hidrop.cli import bench as command

    bench = _bench(shape, 1, pairs, compiled, (method, preset, options))
    counts = parse_counts(images, "--images", 1, 16)
    command.report(bench, lambda p: command.kv(bench, counts, text, pool, p), json_file, png_file)


@bench_app.command()
def burst(  # noqa: PLR0913, PLR0917 (one argument is one option)
    requests: Annotated[int, typer.Option(min=2, max=256, help="One-image requests that arrive at once.")] = 16,
    text: Text = 64,
    budget: Annotated[int, typer.Option(min=1, max=2**20, help="max_num_batched_tokens of both engines.")] = 2048,
    method: Method = "hidrop",
    preset: Preset = None,
    options: Options = "{}",
    shape: Shape = "bench",
    runs: Runs = 3,
    pairs: Pairs = 1,
    compiled: Compiled = True,
    json_file: JsonFile = None,
    png_file: PngFile = None,
) -> None:
    """Time requests that arrive at once until each has its first token."""
    from vllm_hidrop.cli import bench as command

    bench = _bench(shape, runs, pairs, compiled, (method, preset, options))
    command.report(bench, lambda p: command.burst(bench, requests, text, budget, p), json_file, png_file)


@bench_app.command()
def prefix(  # noqa: PLR0913, PLR0917 (one argument is one option)
    text: Text = 64,
    method: Method = "hidrop",
    preset: Preset = None,
    options: Options = "{}",
    shape: Shape = "bench",
    runs: Runs = 15,
    pairs: Pairs = 1,
    compiled: Compiled = True,
    json_file: JsonFile = None,
    png_file: PngFile = None,
) -> None:
    """Time a question about a new image and another about the same one, prefix caching on."""
    from vllm_hidrop.cli import bench as command

    bench = _bench(shape, runs, pairs, compiled, (method, preset, options))
    command.report(bench, lambda p: command.prefix(bench, text, p), json_file, png_file)


@bench_app.command()
def serve(  # noqa: PLR0913, PLR0917 (one argument is one option)
    traffic: Traffic = "image,off,text",
    requests: Annotated[int, typer.Option(min=2, max=10_000, help="Requests of a load.")] = 48,
    output_tokens: Annotated[int, typer.Option(min=2, max=256, help="Tokens of an answer.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time where latency counts.")] = 8,
    method: Method = "hidrop",
    preset: Preset = None,
    options: Options = "{}",
    shape: Shape = "bench",
    runs: Runs = 1,
    pairs: Pairs = 1,
    compiled: Compiled = True,
    json_file: JsonFile = None,
    png_file: PngFile = None,
) -> None:
    """Load both servers over HTTP by vLLM's own benchmark: requests/s with all requests at once, then latencies."""
    from vllm_hidrop.cli import bench as command
    from vllm_hidrop.cli import bench_serve

    bench = _bench(shape, runs, pairs, compiled, (method, preset, options))
    kinds, sizes = parse_names(traffic, "--traffic", TRAFFIC), (requests, output_tokens, concurrency)
    command.report(bench, lambda p: bench_serve.serve(bench, kinds, *sizes, p), json_file, png_file)


@bench_app.command()
def start(
    method: Method = "hidrop",
    preset: Preset = None,
    options: Options = "{}",
    shape: Shape = "bench",
    runs: Runs = 3,
    compiled: Compiled = True,
    json_file: JsonFile = None,
    png_file: PngFile = None,
) -> None:
    """Time the start of an engine process, compiler caches warm."""
    from vllm_hidrop.cli import bench as command

    bench = _bench(shape, runs, 1, compiled, (method, preset, options))
    command.report(bench, lambda p: command.start(bench, p), json_file, png_file)


@bench_app.command()
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
def bench_all(
    shape: Shape = "bench",
    runs: Runs = 15,
    pairs: Pairs = 1,
    compiled: Compiled = True,
    json_file: JsonFile = None,
    png_file: PngFile = None,
) -> None:
    """Every row the documentation quotes, HiDrop tok48 scaled; compiled, and one image eager too."""
    from vllm_hidrop.cli import bench as command
    from vllm_hidrop.cli import bench_all as everything

    bench = _bench(shape, runs, pairs, compiled, ("hidrop", None, "{}"))
    command.report(bench, lambda p: everything.measure_all(bench, p), json_file, png_file)
