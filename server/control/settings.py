"""Every setting of `hidrop serve` that is not plain vLLM's: a row each, with its default and the modules that read it.

:data:`SETTINGS` are flags of ours, and vLLM's flags and environment variables with another default; :data:`REFUSED` are
settings that bypass the checks. Variables must be set before vLLM is imported, so nothing here imports it.
"""

import argparse
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_network
from operator import attrgetter
from typing import Any

from hidrop_server.media.addresses import Network
from hidrop_server.metrics import VLLM_BUCKETS

GROUP = "hidrop-safety"
API_KEY = "--api-key"
METRICS_KEY = "--metrics-api-key"
ADMIN_ROUTES = "--enable-admin-routes"
MEDIA_CONNECTOR = "hidrop"  # name of `hidrop_server.media.connector`'s class in vLLM's registry


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Parse a number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, or 0 for no limit, got {text!r}")
    return value


def network(text: str) -> Network:
    """Parse a network in CIDR notation."""
    try:
        return ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Setting:
    """A row of :data:`SETTINGS`."""

    name: str  # a flag if it begins with ``--``, else an environment variable
    default: Any  # in place of vLLM's own, where vLLM has one
    applied: str  # the modules that read it
    help: str | None = None  # of a flag of ours; None for vLLM's flags and for variables
    read: Callable[[str], Any] | None = None  # parses the value of a flag of ours; None for a switch
    metavar: str | None = None
    variable: str | None = None  # environment variable that is read where the flag is not given
    embedded: bool = False  # for the embedded model only


SETTINGS = (
    Setting("--max-body-mb", 32, "http.bodies", "Largest request body, in MiB; over it: 413.", positive, "MIB"),
    Setting(
        "--max-json-values",
        1 << 18,
        "http.json_bounds, http.body_check",
        "Most values in a request body, for token ids above all; of objects and arrays, a sixteenth as many. "
        "Over it: 400.",
        positive,
        "COUNT",
    ),
    Setting("--max-header-kb", 32, "http.bodies", "Largest request header, in KiB; over it: 431.", positive, "KIB"),
    Setting(
        "--max-grammar-kb",
        64,
        "control.grammars, http.body_check",
        "Largest grammar, schema, pattern or list of choices of structured outputs, in KiB; over it: 400.",
        positive,
        "KIB",
    ),
    Setting(
        "--max-grammar-seconds",
        5,
        "control.grammar_judge",
        "CPU time that compiling one of them may take, once, in a process of its own; over it: 400.",
        positive,
        "SECONDS",
    ),
    Setting(
        "--request-timeout",
        600.0,
        "http.exchanges",
        "Longest time from a request's header to the end of its answer; over it: 504, or an error event in a "
        "stream, and the request is aborted. 0: no limit.",
        seconds,
        "SECONDS",
    ),
    Setting(
        METRICS_KEY,
        None,
        "http.access",
        "What /metrics, and nothing else, is read with (environment: HIDROP_METRICS_API_KEY).",
        str,
        "KEY",
        variable="HIDROP_METRICS_API_KEY",
    ),
    Setting(
        ADMIN_ROUTES,
        False,
        "http.access",
        "Keep vLLM's routes for SageMaker, scaling, aborting, profiling and LoRA: /ping, /invocations, "
        "/scale_elastic_ep, /is_scaling_elastic_ep, /inference/v1/abort_requests, /start_profile and its like.",
    ),
    Setting(
        "--allowed-media-networks",
        [],
        "media.fetching",
        "Networks that URLs of --allowed-media-domains may lead to although they are not public.",
        network,
        "CIDR",
    ),
    Setting(
        "--max-video-frames",
        32,
        "media.videos",
        "Most frames that are sampled of a video; in one that is sent as a list of frames, the most there may be.",
        positive,
        "COUNT",
    ),
    Setting("--max-video-seconds", 300, "media.videos", "Longest video; over it: 400.", positive, "SECONDS"),
    Setting(
        "--max-video-megapixels",
        100,
        "media.videos",
        "Most pixels of a video's sampled frames together, in millions (3 MB each); over it: 400, before a frame is "
        "decoded.",
        positive,
        "COUNT",
    ),
    Setting(
        "--max-video-decode-seconds",
        30,
        "media.videos, media.video_process",
        "CPU time that decoding a video may take, in a process of its own; over it: 400.",
        positive,
        "SECONDS",
    ),
    # vLLM's own, with another default.
    Setting(API_KEY, None, "http.access", variable="VLLM_API_KEY"),
    # vLLM's: 999. A kind of media that the user's own limits leave out keeps this one (`control.arguments`).
    Setting("--limit-mm-per-prompt", {"image": 16, "video": 1}, "vLLM, control.arguments"),
    Setting("--max-num-queued-reqs", 1024, "vLLM, engine"),  # vLLM's: any number
    # vLLM's: 0, abort at once. With the 10 s that ending may take, this is within an orchestrator's usual 30.
    Setting("--shutdown-timeout", 20, "engine, http.exchanges"),
    Setting("--custom-histogram-buckets", VLLM_BUCKETS, "vLLM"),
    # A small PNG can unpack to gigabytes. 50 megapixels is the largest phone camera; vLLM's default is 179.
    Setting("VLLM_MAX_IMAGE_PIXELS", "50000000", "media.images"),
    Setting("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", "20", "media.images"),  # of one file, sent or fetched; vLLM's: 256
    Setting("VLLM_MEDIA_CONNECTOR", MEDIA_CONNECTOR, "media.connector"),
    Setting("HIDROP_END_WITH_PARENT", "1", "vllm_hidrop.engine.compat"),
    # The embedded model is on this disk: no look at the network, a pool a laptop can spare (GiB), and no compilation,
    # which takes longer than the whole demo.
    Setting("HF_HUB_OFFLINE", "1", "Hugging Face's libraries", embedded=True),
    Setting("VLLM_CPU_KVCACHE_SPACE", "1", "vLLM", embedded=True),
    Setting("--served-model-name", ["hidrop-embedded"], "vLLM", embedded=True),
    Setting("--max-model-len", 4096, "vLLM", embedded=True),
    Setting("--block-size", 32, "vLLM", embedded=True),
    Setting("--limit-mm-per-prompt", {"image": 4}, "vLLM", embedded=True),
    Setting("--enforce-eager", True, "vLLM", embedded=True),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags, and our defaults for vLLM's, to vLLM's parser."""
    parser.set_defaults(**flag_defaults(embedded=False))
    group = parser.add_argument_group(GROUP, "Limits of hidrop serve that vLLM has no flag for.")
    for each in SETTINGS:
        if each.help is not None and each.read is None:
            group.add_argument(each.name, action="store_true", help=each.help)
        elif each.help is not None:
            nargs = "+" if isinstance(each.default, list) else None
            read: Any = each.read
            group.add_argument(
                each.name, type=read, nargs=nargs, default=each.default, metavar=each.metavar, help=each.help
            )


def flag_defaults(embedded: bool) -> dict[str, Any]:
    """Our defaults for vLLM's flags, by their names in the parsed arguments."""
    rows = (each for each in SETTINGS if each.help is None and each.embedded == embedded)
    return {_attribute(row.name): row.default for row in rows if row.name.startswith("--") and row.default is not None}


def set_variables(embedded: bool) -> None:
    """Set the environment variables that the user has not set."""
    for each in SETTINGS:
        if not each.name.startswith("--") and embedded >= each.embedded:
            os.environ.setdefault(each.name, each.default)


def keys_of(args: Namespace, flag: str) -> list[str]:
    """The keys given by a flag, else by its variable; the variable is no default, because help prints defaults."""
    (setting,) = (each for each in SETTINGS if each.name == flag)
    given = getattr(args, _attribute(flag)) or os.environ.get(setting.variable or "")
    return [key for key in ([given] if isinstance(given, str) else given or []) if key]


@dataclass(frozen=True)
class Refused:
    """A setting that lets requests reach the engine's inside, past all checks.

    vLLM trusts what comes that way, which it means for callers within the machine: one altered number ends the engine,
    or worse.
    """

    name: str  # flag or environment variable
    reason: str  # shown to the user
    admin: bool = False  # whether :data:`ADMIN_ROUTES`, to which it belongs, permits it
    value: str | None = None  # path in the parsed arguments, where the flag's own name is not it

    def is_set(self, args: Namespace) -> bool:
        """Whether it is set on the command line or in the environment, and :data:`ADMIN_ROUTES` does not permit it."""
        if self.admin and args.enable_admin_routes:
            return False
        if not self.name.startswith("--"):
            return os.environ.get(self.name, "0").strip().lower() not in ("", "0", "false")
        return bool(attrgetter(self.value or _attribute(self.name))(args))


OTHER_LAUNCHER = "it belongs to a launcher that is not ours: run several servers behind a router"
TOKENS_IN = "/inference/v1/generate takes tensors and places of images unchecked: one wrong number ends the engine"
TENSORS = "a request's tensors would enter the language model unchecked"
WITH_ADMIN = f"; together with {ADMIN_ROUTES} only"

REFUSED = (
    Refused("--headless", OTHER_LAUNCHER),
    Refused("--grpc", OTHER_LAUNCHER),
    Refused("--data-parallel-multi-port-external-lb", OTHER_LAUNCHER),
    Refused("--enable-scale-out", TOKENS_IN),
    Refused("--tokens-only", TOKENS_IN),
    Refused("--enable-prompt-embeds", TENSORS),
    Refused("--enable-mm-embeds", f"{TENSORS}: one NaN stays in the cache"),
    Refused("--trust-request-mm-kwargs", "a request could change the size of images under the engine, which ends it"),
    Refused("--enable-elastic-ep", "a request could change the number of engines while others run"),
    Refused("--enable-fault-tolerance", "a request could restart and pause engines"),
    Refused("--profiler-config", f"requests start the profiler{WITH_ADMIN}", True, "profiler_config.profiler"),
    Refused("VLLM_ALLOW_RUNTIME_LORA_UPDATING", f"requests have the server load files{WITH_ADMIN}", True),
    Refused("VLLM_SERVER_DEV_MODE", "its routes call any method of the workers, put them to sleep, change weights"),
    Refused("VLLM_ENABLE_COHERE_API", "its route is not one that our checks know"),
    Refused("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "two requests of one id would be one in the engine"),
    Refused("VLLM_ALLOW_INSECURE_SERIALIZATION", "the engine would unpickle what it is sent"),
)


def find_refused(args: Namespace) -> Refused | None:
    """The first of :data:`REFUSED` that is set."""
    return next((each for each in REFUSED if each.is_set(args)), None)


def _attribute(flag: str) -> str:
    """The name of a flag's value in the parsed arguments."""
    return flag.removeprefix("--").replace("-", "_")
