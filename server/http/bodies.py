"""Reads every request body before the application does, and hands on those that are taken.

Knows ASGI; what a body may hold, :mod:`hidrop_server.http.body_check` says.
"""

import json
from http import HTTPStatus
from io import BytesIO

from fastapi import HTTPException
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hidrop_server.errors import BodyRefused
from hidrop_server.http.answers import OnRefused, error
from hidrop_server.http.body_check import BodyCheck
from hidrop_server.http.brief_errors import brief
from hidrop_server.http.json_bounds import JsonBounds

METHODS = ("POST", "PUT", "PATCH")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BYTES_PER_CHAR = 4
"""Of UTF-8, at most."""
LARGE_BYTES = 4 << 20
MAX_ID_CHARS = 256
ID_HEADERS = ("x-request-id", "x-session-id")
"""vLLM makes these part of the names it gives requests, and of its log."""


class Bodies:
    """400 for a body that is no JSON in UTF-8, too costly, or not what vLLM's routes take.

    Counted as it comes, parsed and checked when it is whole, and then given to the application as one piece. A form
    with files (``multipart/form-data``) is left alone: only routes for audio take one.
    """

    def __init__(self, app: ASGIApp, check: BodyCheck, on_refused: OnRefused) -> None:
        self.app = app
        self.check = check
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, check, hand on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            _check_ids(headers)
            has_body = scope["method"] in METHODS and not headers.get("content-type", "").startswith("multipart/")
            body = await self._checked(scope, receive) if has_body else None
        except BodyRefused as refused:
            self.on_refused(refused.reason)
            await error(HTTPStatus.BAD_REQUEST, brief(refused.says))(scope, receive, send)
        except HTTPException as refused:  # a layer outside of this one has found the body too large
            await error(HTTPStatus(refused.status_code), str(refused.detail))(scope, receive, send)
        except _Disconnected:
            return
        else:
            await self.app(scope, receive if body is None else _again(body, receive), send)

    async def _checked(self, scope: Scope, receive: Receive) -> bytes:
        body = await self._whole(receive)
        if not body:
            return body
        parsed = _parsed(body)
        self.check.check(scope["path"].removeprefix(scope.get("root_path", "")), parsed)
        return body if len(body) <= LARGE_BYTES or body.isascii() else _in_ascii(parsed)

    async def _whole(self, receive: Receive) -> bytes:
        """Read to the end, also what is refused before: a client that sends all before it reads would see no answer."""
        bounds = JsonBounds(self.check.limits.max_values, BYTES_PER_CHAR * self.check.limits.max_text_chars)
        held = BytesIO()  # one growing piece: many small ones would not be given back to the system
        refused: BodyRefused | None = None
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            more = message.get("more_body", False)
            if refused is None:
                held.write(message.get("body", b""))
                try:
                    bounds.feed(message.get("body", b""))
                except BodyRefused as fault:
                    refused = fault
                    held = BytesIO()
        if refused is not None:
            raise refused
        return held.getvalue()


class _Disconnected(Exception):
    """The client is gone."""


def _parsed(body: bytes) -> object:
    """JSON of UTF-8 text, so also without halves of surrogate pairs, which UTF-8 cannot carry."""
    try:
        return from_json(body.removeprefix(BYTE_ORDER_MARK), cache_strings="keys")
    except ValueError as fault:
        raise BodyRefused(f"the body is not JSON in UTF-8: {fault}") from None


def _in_ascii(parsed: object) -> bytes:
    """The body without a letter that would have Python hold all of it, media too, in four bytes for each of one."""
    return json.dumps(parsed).encode()


def _again(body: bytes, receive: Receive) -> Receive:
    """The body as one message, and then whatever else the client does."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again


def _check_ids(headers: Headers) -> None:
    for name in ID_HEADERS:
        if len(headers.get(name, "")) > MAX_ID_CHARS:
            raise BodyRefused(f"{name}: longer than {MAX_ID_CHARS} characters")
