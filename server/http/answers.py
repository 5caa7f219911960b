"""Error answers of the middlewares, in the form of vLLM's own, and the routes that they treat apart."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

PROBES = ("/health", "/ready")  # liveness and readiness: answered also while the server drains
METRICS = "/metrics"

CLOSE = {"Connection": "close"}  # of a refused body no more is read than the two limits below allow
DRAIN_MIB = 128
DRAIN_SECONDS = 10.0
"""How much of a refused body is read, and how long: many clients look for an answer only when they have sent all, and a
connection that is closed before is reset, so that the answer is lost."""

OnRefused = Callable[[str], None]  # called with the reason of every refusal


def error(
    status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None, parameter: str | None = None
) -> JSONResponse:
    """An error response in vLLM's form: its type is the status's phrase, but "BadRequestError" for 400."""
    kind = "BadRequestError" if status is HTTPStatus.BAD_REQUEST else status.phrase
    body = create_error_response(message, kind, status, parameter)
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


async def refuse(response: JSONResponse, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before the body has been read, then drain the body, if there is one, and close the connection."""
    headers = Headers(scope=scope)
    if "content-length" in headers or "transfer-encoding" in headers:
        response.headers.update(CLOSE)
    has_to_be_asked = "expect" in headers  # such a client reads the answer first
    await response(scope, receive, send if has_to_be_asked else draining(receive, send))


def draining(receive: Receive, send: Send) -> Send:
    """A ``send`` that reads the rest of the request before it ends the answer, because the connection closes then."""

    async def send_and_drain(message: Message) -> None:
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        await send({**message, "more_body": True} if is_last else message)
        if is_last:
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    await _drain(receive)
            await send({"type": "http.response.body", "body": b""})

    return send_and_drain


async def _drain(receive: Receive) -> None:
    num_bytes, more = 0, True
    while more and num_bytes < DRAIN_MIB << 20:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)


def is_metrics(path: str) -> bool:
    """Whether vLLM's metrics application answers; it is mounted on a prefix."""
    return path.startswith(METRICS)


class Heads:
    """Answers `HEAD` wherever there is `GET`, with the same status and header; the HTTP server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, with `GET` in place of `HEAD`."""
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self.app({**scope, "method": "GET"} if is_head else scope, receive, send)
