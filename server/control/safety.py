"""Our own safety flags of `hidrop serve`, for what vLLM has none, and safer defaults for those it has.

Knows argparse and the environment; acts on nothing.
"""

import argparse
import os
from ipaddress import ip_network
from typing import Any

from hidrop_server.media.addresses import Network

GROUP = "hidrop-safety"
API_KEY_VARIABLE = "VLLM_API_KEY"
METRICS_KEY_VARIABLE = "HIDROP_METRICS_API_KEY"

SAFER_DEFAULTS: dict[str, Any] = {
    "limit_mm_per_prompt": {"image": 16},  # vLLM's: 999
    "max_num_queued_reqs": 1024,  # vLLM's: any number
    "shutdown_timeout": 20,  # vLLM's: abort at once; with ten seconds to end, within an orchestrator's usual 30
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags and our defaults to vLLM's parser."""
    parser.set_defaults(**SAFER_DEFAULTS)
    group = parser.add_argument_group(GROUP, "Limits of hidrop serve that vLLM has no flag for.")
    group.add_argument(
        "--max-body-mb", type=_positive, default=32, metavar="MIB", help="Largest request body, in MiB; over it: 413."
    )
    group.add_argument(
        "--max-json-values",
        type=_positive,
        default=1 << 18,
        metavar="COUNT",
        help="Most values in a request body, for token ids above all; of objects and arrays, a sixteenth as many. "
        "Over it: 400.",
    )
    group.add_argument(
        "--max-header-kb",
        type=_positive,
        default=32,
        metavar="KIB",
        help="Largest request header, in KiB; over it: 431.",
    )
    group.add_argument(
        "--max-grammar-kb",
        type=_positive,
        default=64,
        metavar="KIB",
        help="Largest grammar, schema, pattern or list of choices of structured outputs, in KiB; over it: 400.",
    )
    group.add_argument(
        "--max-grammar-seconds",
        type=_positive,
        default=5,
        metavar="SECONDS",
        help="CPU time that compiling one of them may take, once, in a process of its own; over it: 400.",
    )
    group.add_argument(
        "--request-timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="Longest time from a request's header to the end of its answer; over it: 504, or an error event in a "
        "stream, and the request is aborted. 0: no limit.",
    )
    group.add_argument(
        "--metrics-api-key",
        metavar="KEY",
        help=f"What /metrics, and nothing else, is read with (environment: {METRICS_KEY_VARIABLE}).",
    )
    group.add_argument(
        "--enable-admin-routes",
        action="store_true",
        help="Keep vLLM's routes for SageMaker, scaling, aborting, profiling and LoRA: /ping, /invocations, "
        "/scale_elastic_ep, /is_scaling_elastic_ep, /inference/v1/abort_requests, /start_profile and its like.",
    )
    group.add_argument(
        "--allowed-media-networks",
        type=_network,
        nargs="+",
        default=[],
        metavar="CIDR",
        help="Networks that URLs of --allowed-media-domains may lead to although they are not public.",
    )


def api_keys(args: argparse.Namespace) -> list[str]:
    """As vLLM reads them: the flag's, else the environment's."""
    return [key for key in args.api_key or [os.environ.get(API_KEY_VARIABLE)] if key]


def metrics_key(args: argparse.Namespace) -> str | None:
    """The flag's, else the environment's; not the flag's default, because help prints defaults."""
    return args.metrics_api_key or os.environ.get(METRICS_KEY_VARIABLE) or None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, or 0 for no limit, got {text!r}")
    return value


def _network(text: str) -> Network:
    try:
        return ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
