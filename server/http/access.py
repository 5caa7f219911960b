"""Who may ask what: once there is a key, all but the probes and the playground's page need it; some routes are gone."""

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

OPEN = (*PROBES, PLAYGROUND)
"""Needs no key; the playground's page holds no secret, and asks for a key itself."""


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
"""There only with ``--enable-admin-routes``: SageMaker's second door to all routes, and power over the engine, over
files of the server and over what others asked."""
SCALE_OUT = ("/inference/v1/generate", "/render", "/derender")
"""Ends of paths that are there only to say that vLLM's ``--enable-scale-out`` is not set."""


REPLACED = "/v1/models"
"""By ours, in `hidrop_server.control.routes`."""


def hide_routes(app: FastAPI, admin_too: bool) -> None:
    """Take vLLM's routes of scale-out, the administrator's if wished, and :data:`REPLACED` out of the application."""
    hidden = {REPLACED, *(ADMIN_ROUTES if admin_too else ())}
    paths = [(route, getattr(route, "path", "")) for route in app.router.routes]
    app.router.routes[:] = [route for route, path in paths if path not in hidden and not path.endswith(SCALE_OUT)]


def drop_stock_authentication(app: FastAPI) -> None:
    """Take vLLM's check out, which guards some prefixes only, for ours to stand in its place."""
    app.user_middleware[:] = [each for each in app.user_middleware if each.cls is not AuthenticationMiddleware]


class Access:
    """Refuses with 401 whoever has not the key of a path.

    With API keys, every path but :data:`OPEN` needs one of them, as ``Authorization: Bearer`` or, as Anthropic's
    clients send it, ``x-api-key``. With a metrics key, ``/metrics`` needs that and no other. A preflight of a browser
    carries no key, and never comes here: the CORS middleware around us answers it.
    """

    def __init__(
        self, app: ASGIApp, api_keys: Iterable[str], metrics_keys: Iterable[str], on_refused: OnRefused
    ) -> None:
        self.app = app
        self.api_digests = [_digest(key) for key in api_keys]
        self.metrics_digests = [_digest(key) for key in metrics_keys] or self.api_digests
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask for the key, then hand on."""
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
