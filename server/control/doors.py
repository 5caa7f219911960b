"""Settings of vLLM that open a door to the engine's inside: refused, each with its reason.

What comes through such a door is taken as it is, by design, for callers that are part of the machine: one number
altered ends the engine, or worse. Knows flags, variables and paths; :data:`DOORS` and :data:`ADMIN_ROUTES` decide.
"""

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI

ADMIN_FLAG = "--enable-admin-routes"
ADMIN_ROUTES = frozenset(
    {
        "/adapters",
        "/adapters/{adapter_name}",
        "/fault_tolerance/apply",
        "/fault_tolerance/status",
        "/inference/v1/abort_requests",
        "/invocations",
        "/is_scaling_elastic_ep",
        "/ping",
        "/scale_elastic_ep",
        "/start_profile",
        "/stop_profile",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    }
)
"""There only with :data:`ADMIN_FLAG`: SageMaker's second door to all routes, and power over the engine, over files of
the server and over what others asked."""
SCALE_OUT = ("/inference/v1/generate", "/render", "/derender")
"""Ends of paths that are there only to say that vLLM's ``--enable-scale-out`` is not set."""


@dataclass(frozen=True)
class Door:
    """One refused setting.

    Attributes:
        setting: flag or variable.
        reason: why it stays shut.
        is_open: whether a command line, or the environment, opens it.
    """

    setting: str
    reason: str
    is_open: Callable[[Namespace], bool]


def _flag(setting: str, reason: str) -> Door:
    name = setting.removeprefix("--").replace("-", "_")
    return Door(setting, reason, lambda args: bool(getattr(args, name)))


def _variable(setting: str, reason: str) -> Door:
    return Door(setting, reason, lambda args: os.environ.get(setting, "0").strip().lower() not in ("", "0", "false"))


def _admin(door: Door) -> Door:
    """Shut unless the administrator's routes, which it belongs to, are wanted."""
    reason = f"{door.reason}; together with {ADMIN_FLAG} only"
    return Door(door.setting, reason, lambda args: door.is_open(args) and not args.enable_admin_routes)


OTHER_LAUNCHER = "it belongs to a launcher that is not ours: run several servers behind a router"
TOKENS_IN = "/inference/v1/generate takes tensors and places of images unchecked: one wrong number ends the engine"
TENSORS = "a request's tensors would enter the language model unchecked: one NaN in the cache spoils others' answers"

DOORS = (
    _flag("--headless", OTHER_LAUNCHER),
    _flag("--grpc", OTHER_LAUNCHER),
    _flag("--data-parallel-multi-port-external-lb", OTHER_LAUNCHER),
    _flag("--enable-scale-out", TOKENS_IN),
    _flag("--tokens-only", TOKENS_IN),
    _flag("--enable-prompt-embeds", "a request's tensors would enter the language model unchecked"),
    _flag(
        "--enable-mm-embeds", "a request's tensors would enter the language model unchecked: one NaN stays in the cache"
    ),
    _flag("--trust-request-mm-kwargs", "a request could change the size of images under the engine, which ends it"),
    _flag("--enable-elastic-ep", "a request could change the number of engines while others run"),
    _flag("--enable-fault-tolerance", "a request could restart and pause engines"),
    _admin(Door("--profiler-config", "requests start the profiler", lambda args: bool(args.profiler_config.profiler))),
    _admin(_variable("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "requests have the server load files")),
    _variable("VLLM_SERVER_DEV_MODE", "its routes call any method of the workers, put them to sleep, change weights"),
    _variable("VLLM_ENABLE_COHERE_API", "its route is not one that our checks know"),
    _variable("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "two requests of one id would be one in the engine"),
    _variable("VLLM_ALLOW_INSECURE_SERIALIZATION", "the engine would unpickle what it is sent"),
)


def find_open_door(args: Namespace) -> Door | None:
    """The first of :data:`DOORS` that is open."""
    return next((door for door in DOORS if door.is_open(args)), None)


def hide_routes(app: FastAPI, admin_too: bool) -> None:
    """Take routes out of the application; they are then 404 and not in its document.

    Args:
        app: loses the routes of scale-out.
        admin_too: whether it loses the administrator's, too.
    """
    hidden = ADMIN_ROUTES if admin_too else frozenset()

    def is_shown(path: str | None) -> bool:
        return path is None or not (path in hidden or path.endswith(SCALE_OUT))

    app.router.routes[:] = [route for route in app.router.routes if is_shown(getattr(route, "path", None))]
