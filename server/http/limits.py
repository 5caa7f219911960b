"""How large a request may be, found out before it is read and while it is read.

Knows ASGI; nothing of what a body says.
"""

from http import HTTPStatus

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hidrop_server.http.answers import CLOSE, OnRefused, draining, error, refuse


class SizeLimits:
    """431 for a header and 413 for a body over the limits, the latter with or without ``Content-Length``.

    A body of no stated length is counted as it comes; the first byte too many ends it, whatever is still to come.
    """

    def __init__(self, app: ASGIApp, max_header_kb: int, max_body_mb: int, on_refused: OnRefused) -> None:
        self.app = app
        self.max_header_bytes = max_header_kb << 10
        self.max_body_bytes = max_body_mb << 20
        self.header_says = f"the request's header is larger than {max_header_kb} KiB (--max-header-kb)"
        self.body_says = f"the request's body is larger than {max_body_mb} MiB (--max-body-mb)"
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the header, then count the body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif sum(len(name) + len(value) for name, value in scope["headers"]) > self.max_header_bytes:
            self.on_refused("header")
            response = error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, self.header_says, CLOSE)
            await refuse(response, scope, receive, send)
        elif int(Headers(scope=scope).get("content-length", "0")) > self.max_body_bytes:
            self.on_refused("body")
            response = error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self.body_says, CLOSE)
            await refuse(response, scope, receive, send)
        else:
            await self._count(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                self.on_refused("body")
                # FastAPI hands on what a middleware raises of this type, and vLLM's handler answers it.
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self.body_says)
            return message

        send_draining = draining(receive, send)

        async def send_last(message: Message) -> None:
            if num_bytes <= self.max_body_bytes:
                await send(message)
                return
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(CLOSE)
            await send_draining(message)

        await self.app(scope, receive_counted, send_last)
