"""How large a request may be, found out before it is read and while it is read.

Knows ASGI; nothing of what a body says.
"""

from collections.abc import Callable
from http import HTTPStatus

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hidrop_server.answers import OnRefused, error

CLOSE = {"Connection": "close"}
"""What the client goes on sending is not read."""


class SizeLimits:
    """431 for a header and 413 for a body over the limits, the latter with or without ``Content-Length``.

    A body of no stated length is counted as it comes; the first byte too many ends it, whatever is still to come.
    """

    def __init__(self, app: ASGIApp, max_header_kb: int, max_body_mb: int, on_refused: OnRefused) -> None:
        self.app = app
        self.max_header_kb = max_header_kb
        self.max_body_mb = max_body_mb
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the header, then count the body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif sum(len(name) + len(value) for name, value in scope["headers"]) > self.max_header_kb << 10:
            self.on_refused("header")
            says = f"the request's header is larger than {self.max_header_kb} KiB (--max-header-kb)"
            response = error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, says, CLOSE)
            await response(scope, receive, send)
        elif _stated_length(scope) > self.max_body_mb << 20:
            self.on_refused("body")
            await error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._says, CLOSE)(scope, receive, send)
        else:
            body = _Counted(receive, send, self.max_body_mb << 20, self._too_much)
            await self.app(scope, body.receive, body.send)

    def _too_much(self) -> HTTPException:
        """FastAPI hands on what a middleware raises of this type, and vLLM's handler answers it."""
        self.on_refused("body")
        return HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._says)

    @property
    def _says(self) -> str:
        return f"the request's body is larger than {self.max_body_mb} MiB (--max-body-mb)"


class _Counted:
    """One request whose body is counted as it comes."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int, too_much: Callable[[], HTTPException]) -> None:
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._too_much = too_much
        self._num_bytes = 0

    async def receive(self) -> Message:
        """The next part of the body.

        Raises:
            HTTPException: it is one too many.
        """
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            raise self._too_much()
        return message

    async def send(self, message: Message) -> None:
        """The answer; after a body that was too large, the last one of its connection."""
        if message["type"] == "http.response.start" and self._num_bytes > self._max_bytes:
            MutableHeaders(scope=message).update(CLOSE)
        await self._send(message)


def _stated_length(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else 0
