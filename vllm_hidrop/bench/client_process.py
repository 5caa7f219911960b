"""vLLM's benchmark client in a process of its own: the first line is answered once it is imported, others run it."""

import argparse
from typing import Any

from vllm_hidrop.bench.piped import serve_lines

FIGURES = ("completed", "request_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms")


def main() -> None:
    """Serve runs until standard input ends."""
    from vllm.benchmarks import serve

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)

    def run(command: dict[str, Any]) -> dict[str, Any]:
        found = serve.main(parser.parse_args(command["arguments"]))
        return {figure: found[figure] for figure in FIGURES}

    serve_lines(lambda _: {}, run)


if __name__ == "__main__":
    main()
