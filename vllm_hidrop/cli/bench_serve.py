"""``hidrop bench serve``: stock vLLM's server and ours under the same load from vLLM's benchmark client."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from rich.progress import Progress

from vllm_hidrop.bench.piped import NO_PLUGINS, child_environment
from vllm_hidrop.bench.rows import Row, make_row
from vllm_hidrop.bench.servers import CHAT_TEMPLATE, STOCK_SERVER, Client, Latencies, Load, ask_once
from vllm_hidrop.bench.shapes import IMAGE_TOKEN, SHAPES
from vllm_hidrop.cli.bench import BLOCK_SIZE, Bench, finished
from vllm_hidrop.cli.local_server import COMMAND, local_server

TEXT = 64
STEP_TOKENS = 2048
MODES = {"image": "pruned", "off": "off", "text": "text"}


def serve(bench: Bench, traffic: Sequence[str], sizes: tuple[int, int, int], progress: Progress) -> list[Row]:
    """Requests/s with all requests at once; TTFT and inter-token latency with some at a time.

    Both servers run throughout and are asked in turn; the first turn is discarded. ``sizes``: requests of a load,
    tokens of an answer, requests at a time for latencies.

    Raises:
        ValueError: a server did not start, rendered the text before the image, or did not do what was asked.
    """
    if SHAPES[bench.shape].is_qwen:
        raise ValueError(f"shape {bench.shape!r} is not served here: the client's pictures are squares of 336 pixels")
    found = []
    for _ in range(bench.pairs):
        with _servers(bench, sizes[0], progress) as urls, Client(bench.model) as client:
            found.append(_measure(bench, urls, client, traffic, sizes, progress))
    return finished(bench, found)


def _measure(
    bench: Bench,
    urls: tuple[str, str],
    client: Client,
    kinds: Sequence[str],
    sizes: tuple[int, int, int],
    progress: Progress,
) -> list[Row]:
    requests, output_tokens, concurrency = sizes
    rows, seed = [], 0
    bar = progress.add_task("HTTP", total=len(kinds) * 4 * (bench.runs + 1))
    for kind in kinds:
        images = 0 if kind == "text" else 1
        _check_rendering(
            bench, urls, Load(1, None, images, TEXT, output_tokens, 10_000_000, kind == "off"), MODES[kind]
        )
        runs: dict[tuple[int, bool], list[Latencies]] = {(who, full): [] for who in (0, 1) for full in (True, False)}
        for turn in range(bench.runs + 1):
            for full in (True, False):
                seed += 1
                for who in (0, 1) if turn % 2 else (1, 0):
                    off = kind == "off" and who == 1
                    load = Load(
                        requests if turn else min(requests, concurrency),
                        None if full else concurrency,
                        images,
                        TEXT,
                        output_tokens,
                        seed,
                        off,
                    )
                    progress.update(bar, description=f"HTTP, {kind}, {('stock', 'ours')[who]}")
                    latencies = client.run(urls[who], load)
                    runs[who, full] += [latencies] if turn else []
                    progress.advance(bar)
        rows += _rows(bench, kind, runs, sizes)
    return rows


def _rows(
    bench: Bench, kind: str, runs: dict[tuple[int, bool], list[Latencies]], sizes: tuple[int, int, int]
) -> list[Row]:
    requests, output_tokens, concurrency = sizes
    command = bench.command(
        "serve", **{"traffic": kind, "requests": requests, "output-tokens": output_tokens, "concurrency": concurrency}
    )

    def row(what: str, unit: str, full: bool, name: str) -> Row:
        stock, ours = (median(getattr(found, what) for found in runs[who, full]) for who in (0, 1))
        return make_row("serve", bench.name("serve", kind, name), (stock, ours), unit, None, command=command)

    return [
        row("requests_per_second", "requests/s", True, "requests/s"),
        row("ttft_ms", "ms", False, f"TTFT p50 at {concurrency}"),
        row("tpot_ms", "ms", False, f"TPOT p50 at {concurrency}"),
        row("itl_ms", "ms", False, f"ITL p50 at {concurrency}"),
    ]


@contextmanager
def _servers(bench: Bench, requests: int, progress: Progress) -> Iterator[tuple[str, str]]:
    """Start stock vLLM and ours with the same flags; yields their addresses."""
    flags = [
        *("--dtype", "bfloat16", "--block-size", str(BLOCK_SIZE), "--no-enable-prefix-caching"),
        *("--max-model-len", "1024", "--max-num-batched-tokens", str(STEP_TOKENS)),
        *("--kv-cache-memory-bytes", str(bench.kv_bytes(requests * 768)), "--limit-mm-per-prompt", '{"image": 4}'),
        *("--chat-template", CHAT_TEMPLATE, "--chat-template-content-format", "openai"),
        *([] if bench.compiled else ["--enforce-eager"]),
    ]
    bar = progress.add_task("starting both servers", total=2)
    model = str(bench.model)
    with local_server(["--model", model, *flags], lambda: None, STOCK_SERVER, child_environment(NO_PLUGINS)) as stock:
        progress.advance(bar)
        choice = ["--hidrop-config", json.dumps(bench.hidrop)]
        with local_server([model, *choice, *flags], lambda: None, COMMAND, child_environment({})) as ours:
            progress.advance(bar)
            yield stock, ours


def _check_rendering(bench: Bench, urls: tuple[str, str], load: Load, mode: str) -> None:
    """Raise ValueError unless prompts were rendered as images, then text, and ours ran in ``mode``."""
    answers = [ask_once(url, bench.model, load) for url in urls]
    for answer in answers:
        tokens = answer["prompt_token_ids"]
        if (
            len(tokens) != load.images * bench.tokens_per_image + load.text
            or IMAGE_TOKEN in tokens[1 + load.images * bench.tokens_per_image :]
        ):
            raise ValueError(
                f"the prompt was not rendered as images, then {load.text} tokens of text: {len(tokens)} tokens, "
                f"{tokens[:2]}...{tokens[-3:]}"
            )
    if bench.method != "none" and answers[1]["hidrop"]["mode"] != mode:
        raise ValueError(f"ours ran {answers[1]['hidrop']['mode']!r}, not {mode!r}")
