"""vLLM's FastAPI application around our engine client, extended.

Ours are the engine client, the media connector, the handlers that answer with a report, the model list, `/hidrop`,
`/ready` and `/playground`, and the middlewares that check keys, bodies and times.
"""

import signal
import sys
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from socket import socket
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import REGISTRY
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.datastructures import State
from starlette.middleware.cors import CORSMiddleware
from vllm import envs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware
from vllm.utils.system_utils import decorate_logs

from hidrop_server.control.grammars import Grammars, Judge
from hidrop_server.control.redaction import hide_in_logs
from hidrop_server.control.routes import describe, router
from hidrop_server.control.settings import API_KEY, METRICS_KEY, keys_of
from hidrop_server.engine import HidropLLM, run_engine
from hidrop_server.http.access import Access, drop_stock_authentication, hide_routes
from hidrop_server.http.answers import Heads
from hidrop_server.http.bodies import Bodies
from hidrop_server.http.body_check import BodyCheck
from hidrop_server.http.body_limits import BodyLimits
from hidrop_server.http.brief_errors import BriefErrors, validation_refusal
from hidrop_server.http.exchanges import Exchanges
from hidrop_server.http.listening import refused_in_one_line
from hidrop_server.http.typed_fields import TypedFields, request_models
from hidrop_server.media.connector import register_connector
from hidrop_server.media.parts import MediaParts
from hidrop_server.media.videos import VideoLimits
from hidrop_server.playground.page import PATH
from hidrop_server.playground.page import router as playground
from hidrop_server.serving import (
    HidropServingChat,
    HidropServingCompletion,
    HidropServingMessages,
    HidropServingResponses,
)
from vllm_hidrop.engine.compat import subclass

LOOPBACK = ("127.0.0.1", "::1", "localhost")
END_SECONDS = 2  # for uvicorn to close connections, once every request has ended and the engine has stopped


async def serve(args: Namespace, vllm_config: Any, judge: Judge) -> int:
    """Bind the port, start the engine, serve until a signal; returns 1 if the engine died, 0 after a requested stop."""
    decorate_logs("APIServer", skip_if_decorated=True)
    signal.signal(signal.SIGTERM, interrupt)
    address, sock = listen(args)
    return await answer(address, sock, args, vllm_config, judge)


def listen(args: Namespace) -> tuple[str, socket]:
    """Bind the port, exclusively; returns the address to show, and the socket."""
    hide_keys(args)
    with refused_in_one_line(args):
        address, sock = setup_server(args, reuse_port=False)
    if not keys_of(args, API_KEY) and args.uds is None and args.host not in LOOPBACK:
        print(f"hidrop serve: no --api-key: whoever reaches {address} may use it", file=sys.stderr, flush=True)
    return address, sock


async def answer(
    address: str,
    sock: socket,
    args: Namespace,
    vllm_config: Any,
    judge: Judge,
    client: Mapping[str, Any] | None = None,
) -> int:
    """Serve on a bound socket until a signal, then end ``sock`` and ``judge``; returns the exit code of :func:`serve`.

    ``client`` is vLLM's description of a running engine's sockets and of this process's place among its clients; None
    where this process starts the engine.
    """
    own = dict(client or {})
    loads, index = own.pop("api_server_loads", None), own.get("client_index", 0)
    async with run_engine(args, vllm_config, own) as engine:
        engine.grammars = Grammars(judge, args.max_grammar_kb, engine.metrics)
        app = await make_app(engine, args)
        if index == 0:
            print(f"hidrop serve: {engine.planner.method} on {address}, playground at {address}{PATH}", flush=True)
        peer_loads = None if loads is None else (loads, index)
        shutdown = await serve_http(app, sock=sock, peer_loads=peer_loads, **uvicorn_options(args))
    try:
        await shutdown
    finally:
        sock.close()
        judge.end()
    return int(engine.has_died)


async def make_app(engine: HidropLLM, args: Namespace) -> FastAPI:
    """Build vLLM's application for this engine, and add our routes, handlers and middlewares."""
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    hide_routes(app, admin_too=not args.enable_admin_routes)
    app.include_router(router)
    app.include_router(playground)
    register_connector(partial(engine.metrics.refused, "media"), VideoLimits.of(args), args.allowed_media_networks)
    await init_app_state(engine, app.state, args, tasks)
    extend_state(app.state, engine)
    protect(app, engine, args)
    return app


def protect(app: FastAPI, engine: HidropLLM, args: Namespace) -> None:
    """Put our middlewares around the application; the one added last meets a request first."""
    drop_stock_authentication(app)
    refused = engine.metrics.refused
    undo_middlewares(app)
    # Starlette declares a handler's argument as any exception; this one is called for its own only.
    app.add_exception_handler(RequestValidationError, validation_refusal)  # type: ignore[arg-type]
    app.add_middleware(BriefErrors)
    sizes = {"max_header_kb": args.max_header_kb, "max_body_mb": args.max_body_mb}
    app.add_middleware(Bodies, check=body_check(app, engine, args), **sizes, on_refused=refused)
    app.add_middleware(Heads)
    seconds = args.request_timeout
    app.add_middleware(Exchanges, in_flight=engine.in_flight, seconds=seconds, on_refused=refused)
    keys = {"api_keys": keys_of(args, API_KEY), "metrics_keys": keys_of(args, METRICS_KEY)}
    app.add_middleware(Access, **keys, on_refused=refused)
    build_middlewares(app)


def body_check(app: FastAPI, engine: HidropLLM, args: Namespace) -> BodyCheck:
    """Make the check of bodies for this server's routes, model and flags."""
    limits = BodyLimits.of(args.max_json_values, engine.model_config.max_model_len, args.max_grammar_kb)
    return BodyCheck(limits, MediaParts(modalities(engine)), TypedFields(request_models(app)))


def modalities(engine: HidropLLM) -> list[str]:
    """What the model takes besides text, as far as the server lets it."""
    return [name for name, most in engine.allowed_media.items() if most > 0]


OUTERMOST = (CORSMiddleware, XRequestIdMiddleware)  # write headers into all answers, also refusals and errors


def build_middlewares(app: FastAPI) -> None:
    """Build the middlewares, :data:`OUTERMOST` outside Starlette's own handler of unforeseen errors, too."""
    outermost = [each for each in app.user_middleware if each.cls in OUTERMOST]
    app.user_middleware[:] = [each for each in app.user_middleware if each.cls not in OUTERMOST]
    stack = app.build_middleware_stack()
    for each in reversed(outermost):
        stack = each.cls(stack, *each.args, **each.kwargs)
    app.middleware_stack = stack


def undo_middlewares(app: FastAPI) -> None:
    """Discard the stack of middlewares that the last step of ``build_app`` (SageMaker's) has built, to build it anew.

    The middleware that counts HTTP answers would then find the names of its metrics taken, and count nothing. So they
    are freed, and it gets the process's registry in place of vLLM's: with several processes, vLLM's also holds the sums
    over all of them, and the metrics would be shown twice.
    """
    middlewares: list[Any] = app.user_middleware
    for each in middlewares:
        if each.cls is PrometheusInstrumentatorMiddleware:
            registry = each.kwargs["registry"]
            for collector, names in list(registry._collector_to_names.items()):
                if any(name.startswith("http_") for name in names):
                    registry.unregister(collector)
            each.kwargs["registry"] = REGISTRY
    app.middleware_stack = None


def hide_keys(args: Namespace) -> None:
    """Keep the keys out of this process's log."""
    hide_in_logs([*keys_of(args, API_KEY), *keys_of(args, METRICS_KEY)])


HANDLERS = {
    "openai_serving_chat": HidropServingChat,
    "openai_serving_completion": HidropServingCompletion,
    "openai_serving_responses": HidropServingResponses,
    "anthropic_serving_messages": HidropServingMessages,
}
HANDLERS_WHY = "init_app_state names the handlers' classes and makes them of twenty arguments; until it takes classes"


def extend_state(state: State, engine: HidropLLM) -> None:
    """Put our handlers where vLLM's routes look for them; one handler answers chats and batches of chats."""
    shape = engine.vllm_config.additional_config["hidrop"]["resolved"]["model_shape"]
    state.hidrop = describe(engine.planner, modalities(engine), shape["is_dynamic"])
    state.openai_serving_chat = state.openai_serving_chat_batch
    for name, handler in HANDLERS.items():
        setattr(state, name, subclass(getattr(state, name), handler, why=HANDLERS_WHY))
    state.openai_serving_chat_batch = state.openai_serving_chat


def uvicorn_options(args: Namespace) -> dict[str, Any]:
    """What vLLM's ``build_and_serve`` gives uvicorn, copied because that function builds the application itself."""
    same_name = (
        "host port enable_ssl_refresh ssl_keyfile ssl_certfile ssl_ca_certs ssl_cert_reqs ssl_ciphers "
        "h11_max_incomplete_event_size h11_max_header_count"
    )
    log_config = get_uvicorn_log_config(args)
    return {
        **{name: getattr(args, name) for name in same_name.split()},
        "log_level": args.uvicorn_log_level,
        "access_log": not args.disable_uvicorn_access_log,
        "http": "h11",  # the faster parser has no limit for headers
        "timeout_graceful_shutdown": END_SECONDS,
        "timeout_keep_alive": envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        **({"log_config": log_config} if log_config is not None else {}),
    }


def interrupt(*_: object) -> None:
    """Handle a SIGTERM that comes before uvicorn handles signals: end the start."""
    raise KeyboardInterrupt("terminated")
