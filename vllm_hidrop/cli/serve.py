"""``hidrop serve``: hand over to the server package."""

from collections.abc import Mapping, Sequence
from typing import Any


def run(choice: Mapping[str, Any], arguments: Sequence[str]) -> int:
    """Serve until stopped; returns the exit code.

    Args:
        choice: keys of ``vllm_hidrop.config.HidropConfig``.
        arguments: of vLLM; the first one, if it is no flag, is the model.
    """
    from hidrop_server import main

    has_model = bool(arguments) and not arguments[0].startswith("-")
    return main(arguments[0] if has_model else None, choice, list(arguments[has_model:]))


def vllm_help(topic: str) -> None:
    """Print vLLM's own help."""
    from hidrop_server.control.arguments import print_vllm_help

    print_vllm_help(topic)
