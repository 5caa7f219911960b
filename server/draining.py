"""503s that say when to come back, and a server that ends without losing what it has begun.

Knows ASGI and the two counters of the engine client; not the engine's processes.
"""

from http import HTTPStatus
from typing import Protocol

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hidrop_server.answers import PROBES, error, is_metrics

RETRY_AFTER_SECONDS = "1"
"""A full queue empties request by request, and behind a router another server is asked."""


class Drainable(Protocol):
    """What the engine client says of its shutdown and is told of requests."""

    draining: bool
    num_exchanges: int


class Admission:
    """Counts the requests in flight, admits none once the server drains, and puts ``Retry-After`` on every 503."""

    def __init__(self, app: ASGIApp, engine: Drainable) -> None:
        self.app = app
        self.engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count a request while it runs."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path in PROBES or is_metrics(path):
            await self.app(scope, receive, send)
            return
        if self.engine.draining:
            response = error(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "this server is shutting down",
                {"Retry-After": RETRY_AFTER_SECONDS, "Connection": "close"},
            )
            await response(scope, receive, send)
            return
        self.engine.num_exchanges += 1
        try:
            await self.app(scope, receive, _with_retry_after(send))
        finally:
            self.engine.num_exchanges -= 1


def _with_retry_after(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
            MutableHeaders(scope=message).setdefault("Retry-After", RETRY_AFTER_SECONDS)
        await send(message)

    return sending
