"""The ``hidrop`` command line: names, options and help; `vllm_hidrop.cli.errors` says how commands end when they fail.

A command imports the file that does its work when it runs, so help needs neither PyTorch nor vLLM.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_hidrop.cli.bench_app import bench_app
from vllm_hidrop.cli.errors import OneLineErrors
from vllm_hidrop.cli.media import MOST_TOKENS
from vllm_hidrop.cli.options import (
    AsJson,
    Choice,
    JsonFile,
    Model,
    PngFile,
    Prompt,
    Url,
    grouped,
    output_file,
    output_folder,
    parse_address,
    parse_counts,
    parse_names,
    server_address,
)
from vllm_hidrop.json_text import parse_object

app = typer.Typer(
    name="hidrop",
    cls=OneLineErrors,
    help="Serve multimodal models with fewer vision tokens per layer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

app.add_typer(bench_app, name="bench")

MOST_QUESTIONS = 10_000_000
MOST_SEED = 2**32 - 1
MOST = 1e9  # bound of speeds, sizes and loads: no machine reaches it, and no product overflows


@app.callback()
def main() -> None:
    """Serve multimodal models with fewer vision tokens per layer."""


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method: also what differs from its paper and code.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the pruning methods, their options and presets."""
    from vllm_hidrop.cli import methods as command

    command.run(name, as_json)


@app.command()
def families(as_json: AsJson = False) -> None:
    """List the model families, and what was run of each."""
    from vllm_hidrop.cli import families as command

    command.run(as_json)


@app.command()
@grouped
def plan(
    choice: Choice,
    prompt: Prompt,
    model: Model = "embedded",
    block_size: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of a KV block.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Print what a schedule would cost one request: rows, KV blocks and prefill FLOPs by stage."""
    from vllm_hidrop.cli import plan as command

    command.run(model, choice.read(), prompt, block_size, as_json)


@app.command()
@grouped
def capacity(  # noqa: PLR0913, PLR0917 (one argument is one option)
    choice: Choice,
    prompt: Prompt,
    tflops: Annotated[float, typer.Option(min=0.001, max=MOST, help="TFLOP/s your machine reaches in a prefill.")],
    bandwidth: Annotated[float, typer.Option(min=0.001, max=MOST, help="GB/s it reads in a decode step.")],
    kv_gib: Annotated[float, typer.Option(min=0.001, max=MOST, help="GiB of its KV pool, as vLLM prints it at start.")],
    model: Model = "7b",
    output_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of an answer.")] = 128,
    requests_per_second: Annotated[float, typer.Option(min=0.001, max=MOST, help="The load to be held.")] = 10.0,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Sequences a server runs at once, as its flag.")
    ] = 256,
    headroom: Annotated[float, typer.Option(min=0, max=0.95, help="Share of every machine left free.")] = 0.3,
    as_json: AsJson = False,
) -> None:
    """Print how many machines a load needs at least, pruned and dense, from `plan` and three numbers of a machine."""
    from vllm_hidrop.cli import capacity as command
    from vllm_hidrop.plan.capacity import Machine

    machine = Machine(tflops * 1e12, bandwidth * 1e9, kv_gib * 2**30, max_num_seqs)
    target = command.Target(requests_per_second, headroom, output_tokens)
    command.run(model, choice.read(), prompt, machine, target, as_json)


SERVE_EPILOG = (
    "Limits and keys: hidrop serve --vllm-help hidrop-safety. Every other flag goes to vLLM: hidrop serve --vllm-help "
    "all, or --vllm-help FLAG."
)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=SERVE_EPILOG,
    options_metavar="[MODEL] [OPTIONS] [VLLM FLAGS]",
)
@grouped
def serve(
    context: typer.Context,
    choice: Choice,
    vllm_help: Annotated[
        str | None, typer.Option(metavar="all|FLAG|GROUP", help="Print vLLM's own help and exit.")
    ] = None,
) -> None:
    """Serve MODEL, a directory or hub name, or the embedded one, by vLLM's OpenAI-compatible server."""
    if vllm_help is not None:
        from hidrop_server.control.arguments import print_vllm_help

        print_vllm_help(vllm_help)
    else:
        from hidrop_server import main

        has_model = bool(context.args) and not context.args[0].startswith("-")
        model = context.args[0] if has_model else None
        raise typer.Exit(main(model, choice.read(), context.args[has_model:]))


@app.command("train")
def train_model(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to train; see docs/train.md.")],
) -> None:
    """Train a LLaVA with a pruning schedule on; the same command again resumes an interrupted run."""
    from vllm_hidrop.cli import train as command

    raise typer.Exit(command.run(config))


@app.command()
def verify(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help='A directory, a hub name, or "embedded"; after the tiny ones.'),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|bfloat16|float16", help="The type to serve in; the tiny models run in float32 as well."
        ),
    ] = "auto",
    shape: Annotated[
        str, typer.Option(help='Of the table of times: "tiny", "bench", "2.7b", "7b" or "auto", the largest that fits.')
    ] = "auto",
    minutes: Annotated[
        float,
        typer.Option(min=0, max=MOST, help="Of MODEL and the table, what has not begun by then is left out and named."),
    ] = 6,
    json_file: JsonFile = None,
) -> None:
    """Prove this machine's engine: against stock vLLM, against references, then how fast it is (docs/verify.md).

    Exit status: 0 if all that ran passed, 1 if a check failed, 2 if none could run.
    """
    from vllm_hidrop.cli import verify as command

    chosen = parse_names(dtype, "--dtype", ("auto", "bfloat16", "float16"))[0]
    raise typer.Exit(command.run(command.Wish(model, chosen, shape, minutes, json_file)))


@app.command()
def demo(
    examples: Annotated[
        Path | None, typer.Option(help="Folder with questions.jsonl.", show_default="examples/ of the repository")
    ] = None,
    url: Url = None,
    json_file: JsonFile = None,
) -> None:
    """Ask questions about pictures with and without pruning, and compare answers, tokens, blocks and times."""
    from vllm_hidrop.cli import demo as command

    raise typer.Exit(command.run(examples, url, json_file))


@app.command()
def monitor(
    png: PngFile = Path("dashboard.png"),
    url: Url = None,
    seconds: Annotated[float, typer.Option(min=5, max=86_400, help="How long to send requests.")] = 60,
    clients: Annotated[int, typer.Option(min=1, max=64, help="Requests at once.")] = 3,
) -> None:
    """Send traffic to a server that a real Prometheus scrapes, and draw what the dashboards show (docs/metrics.md)."""
    from vllm_hidrop.cli import monitor as command

    raise typer.Exit(command.run(url, command.Traffic(seconds, clients), png))


@app.command()
def loadtest(  # noqa: PLR0913, PLR0917 (one argument is one option)
    scenario: Annotated[str | None, typer.Argument(help="Name of a scenario; without one they are listed.")] = None,
    url: Url = None,
    compare: Annotated[
        str, typer.Option(metavar="off|none|URL", help="Ask the same server to keep every token, or another server.")
    ] = "off",
    pairs: Annotated[int, typer.Option(min=1, max=100, help="Times each is run, in alternating order.")] = 1,
    length: Annotated[
        int, typer.Option(min=1, max=10_000, help="Times as many requests and seconds as the scenario says.")
    ] = 1,
    file: Annotated[Path | None, typer.Option(help="Scenarios of your own (TOML).")] = None,
    out: Annotated[Path, typer.Option(callback=output_folder, help="Folder for the report, HTML and JSON.")] = Path(
        "runs/loadtest"
    ),
    api_key: Annotated[str | None, typer.Option(help="Key of the servers.", envvar="OPENAI_API_KEY")] = None,
    metrics_api_key: Annotated[
        str | None, typer.Option(help="Key of /metrics, where it has one.", envvar="HIDROP_METRICS_API_KEY")
    ] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let an address be another machine's, whose owner agrees.")
    ] = False,
) -> None:
    """Load a server by vLLM's benchmark client, with and without pruning, and write one HTML report."""
    from hidrop_loadtests import scenarios
    from hidrop_loadtests.running import Keys
    from vllm_hidrop.cli import loadtest as command

    if scenario is None:
        command.show_scenarios(file)
    else:
        compare = compare if compare in command.SAME_SERVER else parse_address(compare, "--compare")
        target = command.Target(url, compare, Keys(api_key, metrics_api_key), allow_remote)
        chosen = scenarios.lengthened(scenarios.choose(scenario, file or scenarios.SHIPPED), length)
        raise typer.Exit(command.run(scenario, chosen, target, out, pairs))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory of an original LLaVA-1.5 or HiDrop.")],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", callback=output_folder, help="New directory, or one of an interrupted run.")
    ],
    preset: Annotated[
        str | None, typer.Option(help="Schedule it was trained with: tok48, tok64, tok80, tok48-c1 (C1) or none.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="JSON", help="Its schedule where no preset has it: HiDrop's options.")
    ] = None,
    vision_tower: Annotated[
        Path | None, typer.Option(help="Directory of the CLIP tower.", show_default="mm_vision_tower, if it is one")
    ] = None,
) -> None:
    """Turn an original LLaVA-1.5 or HiDrop checkpoint into the Hugging Face format that vLLM loads."""
    from vllm_hidrop.cli import convert as command

    own = None if schedule is None else parse_object(schedule, "--schedule")
    command.run(source, destination, preset, own, vision_tower)


eval_app = typer.Typer(
    help="Accuracy of a server over HTTP, on synthetic scenes or a benchmark you have.", invoke_without_command=True
)
app.add_typer(eval_app, name="eval")


@eval_app.callback()
def evaluate(  # noqa: PLR0913, PLR0917 (one argument is one option)
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(callback=server_address, help="An OpenAI-compatible server, for example http://HOST:8000."),
    ] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Serve the embedded model, and compare dense with HiDrop.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Name of the model.", show_default="the first served")] = None,
    task: Annotated[str, typer.Option(help="synthetic, pope, scienceqa, gqa, textvqa, mme or mmbench.")] = "synthetic",
    data: Annotated[Path | None, typer.Option(help="The benchmark's file or folder; see docs/eval.md.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the benchmark's images.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_QUESTIONS, help="Questions to ask.", show_default="all; synthetic: 140"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Picks scenes, the questions of a limit, and resamples.")
    ] = 0,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at once.")] = 4,
    off: Annotated[bool, typer.Option("--off", help="Ask a HiDrop server to keep every vision token.")] = False,
    xargs: Annotated[str, typer.Option(help="vllm_xargs of every request, a JSON object.")] = "{}",
    api_key: Annotated[str, typer.Option(help="Key of the server.", envvar="OPENAI_API_KEY")] = "none",
    json_file: JsonFile = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=output_folder, help="Keep answers here; a second run asks only what is missing."),
    ] = None,
) -> None:
    """Accuracy of a server over HTTP: give --url or --embedded, or plot results with `hidrop eval plot`."""
    if context.invoked_subcommand is not None:
        return
    if embedded and (url or model or off or xargs != "{}"):
        raise ValueError("--embedded chooses server, model and vllm_xargs itself")
    if not embedded and url is None:
        raise ValueError("give --url or --embedded")
    from vllm_hidrop.cli import evaluate as command
    from vllm_hidrop.lab.evaluate.endpoint import Endpoint
    from vllm_hidrop.lab.evaluate.samples import Source

    choice = command.Choice(task, Source(data, images, limit, seed), concurrency, json_file, out)
    if url is None:
        raise typer.Exit(command.run_embedded(choice))
    extra = command.xargs(off, parse_object(xargs, "--xargs"))
    raise typer.Exit(command.run_url(choice, Endpoint(url, api_key, model, extra)))


@eval_app.command("plot")
def eval_plot(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="What --json wrote.")],
    png: PngFile,
) -> None:
    """Draw accuracy against mean vision tokens per layer, with intervals, from one or several results."""
    from vllm_hidrop.cli import evaluate as command

    command.run_plot(results, png)


@app.command()
def calibrate(  # noqa: PLR0913, PLR0917 (one argument is one option)
    model: Annotated[str, typer.Argument(help='A directory, a hub name, or "embedded".')],
    data: Annotated[str, typer.Option(help='A file in LLaVA\'s JSON form, or "synthetic".')],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the file's images.", show_default="the file's own")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, max=MOST_QUESTIONS, help="Samples to measure.")] = 64,
    method: Annotated[
        Literal["hidrop", "visipruner"], typer.Option(help="Method whose numbers are proposed.")
    ] = "hidrop",
    budget: Annotated[
        float,
        typer.Option(min=0, max=MOST_TOKENS, help="HiDrop: vision tokens per layer, mean over all layers."),
    ] = 64,
    filters: Annotated[int, typer.Option(min=1, max=1024, help="HiDrop: filters at most.")] = 4,
    keep: Annotated[
        str, typer.Option(help="VisiPruner: vision tokens kept: a count, a fraction, or a share of the image's.")
    ] = "16/576",
    fixed_layers: Annotated[
        bool, typer.Option("--fixed-layers", help="VisiPruner: propose layers and a keep, not thresholds.")
    ] = False,
    exit_tolerance: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of answer tokens that an exit (VisiPruner: each part) may change."),
    ] = 0.01,
    windows: Annotated[str, typer.Option(help="ILVAS windows in layers; the first one decides.")] = "2,4",
    top_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="ILVAS: most attended vision tokens compared.")
    ] = 32,
    answer_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of an answer used at most.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Which synthetic scenes.")] = 0,
    device: Annotated[str, typer.Option(help="PyTorch device.")] = "cpu",
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", callback=output_file, help="Write the schedule for serve --hidrop-config, the curves beside it."
        ),
    ] = None,
    png_file: Annotated[
        Path | None, typer.Option("--png", callback=output_file, help="Draw the curves and the schedule.")
    ] = None,
) -> None:
    """Measure what a model's layers do with vision; propose HiDrop's or VisiPruner's numbers (docs/calibrate.md)."""
    from vllm_hidrop.cli import calibrate as command
    from vllm_hidrop.lab.calibrate.curves import Settings

    shown, output = command.Data(data, images, samples, seed), command.Output(json_file, png_file)
    if method == "visipruner":
        visipruner = command.VisiPrunerWish(keep, exit_tolerance, fixed_layers)
        command.run_visipruner(model, shown, visipruner, output, answer_tokens, device)
        return
    command.run(
        model,
        shown,
        command.Wish(budget, filters, exit_tolerance),
        output,
        Settings(parse_counts(windows, "--windows", 1, 1024), top_tokens, answer_tokens),
        device,
    )
