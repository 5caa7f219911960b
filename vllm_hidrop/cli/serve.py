"""``hidrop serve``: hand over to the server package."""

from collections.abc import Sequence


def run(method: str | None, preset: str | None, hidrop_config: str | None, arguments: Sequence[str]) -> int:
    """Serve until stopped; returns the exit code."""
    from hidrop_server import main

    has_model = bool(arguments) and not arguments[0].startswith("-")
    model = arguments[0] if has_model else None
    return main(model, method, preset, hidrop_config, list(arguments[has_model:]))


def vllm_help(topic: str) -> None:
    """Print vLLM's own help."""
    from hidrop_server.control.arguments import print_vllm_help

    print_vllm_help(topic)
