"""The ``hidrop`` command line: names, options and help; the work is in `vllm_hidrop.commands`.

A command imports its file when it runs, so help needs neither PyTorch nor vLLM. A mistake of the
user is one line on standard error and exit code 2.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="hidrop",
    help="Serve multimodal models with fewer vision tokens per layer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def main() -> None:
    """Serve multimodal models with fewer vision tokens per layer."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report a ValueError as one line on standard error, exit code 2."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"hidrop: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the pruning methods, their options and presets."""
    from vllm_hidrop.commands import methods as command

    command.run(as_json)


@app.command()
def plan(  # noqa: PLR0913, PLR0917 (one argument is one option)
    model: Annotated[
        str, typer.Argument(help='A directory, a hub name, "embedded", or "7b" or "13b" for LLaVA-1.5.')
    ] = "embedded",
    method: Annotated[str | None, typer.Option(help="Pruning method [default: the checkpoint's].")] = None,
    preset: Annotated[str | None, typer.Option(help="Named schedule of the method.")] = None,
    options: Annotated[str, typer.Option(help="The method's options, a JSON object.")] = "{}",
    force: Annotated[bool, typer.Option(help="Allow a schedule the checkpoint was not trained for.")] = False,
    images: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Vision tokens of an image; repeat for several [default: the model's]."),
    ] = None,
    text: Annotated[int, typer.Option(min=1, help="Text tokens of the prompt.")] = 64,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a KV block.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Print what a schedule would cost one request: rows, KV blocks and prefill FLOPs by stage."""
    from vllm_hidrop.commands import plan as command

    with one_line_errors():
        choice: dict[str, Any] = {"options": parse_object(options, "--options"), "force": force}
        choice |= {key: value for key, value in (("method", method), ("preset", preset)) if value}
        command.run(model, choice, images or [], text, block_size, as_json)


SERVE_EPILOG = "Every other flag goes to vLLM: hidrop serve --vllm-help all, or --vllm-help FLAG."


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=SERVE_EPILOG,
    options_metavar="[MODEL] [OPTIONS] [VLLM FLAGS]",
)
def serve(
    context: typer.Context,
    method: Annotated[str | None, typer.Option(help="Pruning method (default: the checkpoint's, else none).")] = None,
    preset: Annotated[str | None, typer.Option(help="Named schedule of the method.")] = None,
    hidrop_config: Annotated[
        str | None,
        typer.Option(metavar="JSON|FILE", help="Keys: method, preset, options, force; the two options above win."),
    ] = None,
    vllm_help: Annotated[
        str | None, typer.Option(metavar="all|FLAG|GROUP", help="Print vLLM's own help and exit.")
    ] = None,
) -> None:
    """Serve MODEL, a directory or hub name, or the embedded one, by vLLM's OpenAI-compatible server."""
    from vllm_hidrop.commands import serve as command

    if vllm_help is not None:
        command.vllm_help(vllm_help)
    else:
        raise typer.Exit(command.run(method, preset, hidrop_config, context.args))


@app.command()
def demo(
    examples: Annotated[
        Path | None, typer.Option(help="Folder with questions.jsonl (default: examples/ of the repository).")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A running server (default: start one with the embedded model).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Ask questions about pictures with and without pruning, and compare answers, tokens, blocks and times."""
    from vllm_hidrop.commands import demo as command

    with one_line_errors():
        raise typer.Exit(command.run(examples, url, json_file))


bench_app = typer.Typer(help="Measure ours against stock vLLM on the same random weights.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Shape = Annotated[str, typer.Option(help='Size of the random-weight model: "tiny", "bench", "2.7b" or "7b".')]
Runs = Annotated[int, typer.Option(min=1, help="Paired runs per figure.")]
Compiled = Annotated[bool, typer.Option("--compiled", help="Both engines compile (default: both eager).")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]


@bench_app.command()
def prefill(  # noqa: PLR0913, PLR0917 (one argument is one option)
    images: Annotated[int, typer.Option(min=0, max=16, help="Images of the prompt.")] = 1,
    text: Annotated[int, typer.Option(min=2, help="Text tokens of the prompt.")] = 64,
    method: Annotated[str, typer.Option(help="Pruning method.")] = "hidrop",
    preset: Annotated[str | None, typer.Option(help="Named schedule (hidrop: tok48, scaled).")] = None,
    options: Annotated[str, typer.Option(help="The method's options, a JSON object.")] = "{}",
    shape: Shape = "bench",
    runs: Runs = 15,
    compiled: Compiled = False,
    json_file: JsonFile = None,
) -> None:
    """Time one prompt's prefill, vision tower included; the staged loop itself is never compiled yet."""
    with one_line_errors():
        from vllm_hidrop.commands import bench as command

        choice: dict[str, Any] = {"method": method, "options": parse_object(options, "--options")}
        if method == "hidrop":
            choice["preset"] = preset or "tok48"
            choice["options"].setdefault("scale", True)
        elif preset:
            choice["preset"] = preset
        command.run_prefill(command.Bench(shape, runs, not compiled), choice, images, text, json_file)


@bench_app.command("all")
def bench_all(shape: Shape = "bench", runs: Runs = 15, json_file: JsonFile = None) -> None:
    """Every figure the documentation quotes: prefill in both modes, then what must not cost anything, compiled."""
    with one_line_errors():
        from vllm_hidrop.commands import bench as command

        command.run_all(command.Bench(shape, runs, eager=False), json_file)


def parse_object(text: str, option: str) -> dict[str, Any]:
    """Read a JSON object given on the command line.

    Raises:
        ValueError: not JSON, or not an object; the message names the option.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{option} must be a JSON object, got {text}")
    return value
