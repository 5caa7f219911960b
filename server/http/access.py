"""API keys: once one is set, all but probes and the playground's page need it. Also removes some of vLLM's routes."""

import hashlib
import hmac
from collections.abc import Iterable
from http import HTTPStatus

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from hidrop_server.http.answers import PROBES, OnRefused, error, is_metrics, refuse
from hidrop_server.playground.page import PATH as PLAYGROUND

OPEN = (*PROBES, PLAYGROUND)  # needs no key; the playground's page holds no secret, and asks for a key itself


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
"""Served only with ``--enable-admin-routes``: SageMaker's second path to all routes, and power over the engine, the
server's files and other clients' requests."""
SCALE_OUT = ("/inference/v1/generate", "/render", "/derender")  # path endings; vLLM serves only a refusal there


REPLACED = "/v1/models"  # by ours, in `hidrop_server.control.routes`
UNKNOWN = "/v1/decisions"  # of vLLM 0.33: what its bodies may have, our checks do not know


def hide_routes(app: FastAPI, admin_too: bool) -> None:
    """Remove vLLM's scale-out routes, :data:`REPLACED`, :data:`UNKNOWN`, and the administrator's if wished."""
    hidden = {REPLACED, UNKNOWN, *(ADMIN_ROUTES if admin_too else ())}
    paths = [(route, getattr(route, "path", "")) for route in app.router.routes]
    app.router.routes[:] = [route for route, path in paths if path not in hidden and not path.endswith(SCALE_OUT)]


def drop_stock_authentication(app: FastAPI) -> None:
    """Remove vLLM's key check, which guards some prefixes only; :class:`Access` stands in its place."""
    app.user_middleware[:] = [each for each in app.user_middleware if each.cls is not AuthenticationMiddleware]


class Access:
    """Answers 401 to a request without the key that its path needs.

    With API keys, every path but :data:`OPEN` needs one of them, as ``Authorization: Bearer`` or, from Anthropic's
    clients, ``x-api-key``. With a metrics key, ``/metrics`` needs that and no other. A browser's preflight carries no
    key and never comes here: the CORS middleware around us answers it.
    """

    def __init__(
        self, app: ASGIApp, api_keys: Iterable[str], metrics_keys: Iterable[str], on_refused: OnRefused
    ) -> None:
        self.app = app
        self.api_digests = [_digest(key) for key in api_keys]
        self.metrics_digests = [_digest(key) for key in metrics_keys] or self.api_digests
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application if the request has its key; else 401, or close a websocket with 1008."""
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self.app(scope, receive, send)
            return
        self.on_refused("key")
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        response = error(HTTPStatus.UNAUTHORIZED, "a valid API key is needed", {"WWW-Authenticate": "Bearer"})
        await refuse(response, scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        digests = self.metrics_digests if is_metrics(path) else self.api_digests
        if not digests or path in OPEN:
            return True
        headers = Headers(scope=scope)
        given = _digest(_key_in(headers))
        return any(hmac.compare_digest(given, digest) for digest in digests)


def _key_in(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
