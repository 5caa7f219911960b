"""Reads and checks every request body before the application sees it."""

import json
from http import HTTPStatus
from io import BytesIO

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hidrop_server.errors import BodyRefused
from hidrop_server.http.answers import CLOSE, OnRefused, error, refuse
from hidrop_server.http.body_check import BodyCheck
from hidrop_server.http.body_limits import MAX_ID_CHARS
from hidrop_server.http.brief_errors import brief
from hidrop_server.http.json_bounds import JsonBounds

METHODS = ("POST", "PUT", "PATCH")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BYTES_PER_CHAR = 4  # of UTF-8, at most
LARGE_BYTES = 4 << 20
ID_HEADERS = ("x-request-id", "x-session-id")  # vLLM makes these part of the names it gives requests, and of its log


class Bodies:
    """Answers 431 to a header and 413 to a body over its limit, and 400 to a body that vLLM's routes do not take.

    A body is counted as it arrives, whatever length it states, and the first byte too many ends it. When it is whole it
    is parsed (400 where it is no JSON in UTF-8 or would cost too much), checked, and given to the application as one
    piece. A form with files (``multipart/form-data``) is only counted: routes for audio alone take one.
    """

    def __init__(
        self, app: ASGIApp, check: BodyCheck, max_header_kb: int, max_body_mb: int, on_refused: OnRefused
    ) -> None:
        self.app = app
        self.check = check
        self.max_header_kb = max_header_kb
        self.max_body_mb = max_body_mb
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with the checked body, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_header(scope)
            body = await self._checked(scope, receive) if scope["method"] in METHODS else None
        except BodyRefused as refused:
            self.on_refused(refused.reason)
            if refused.status is HTTPStatus.BAD_REQUEST:
                await error(refused.status, brief(refused.says))(scope, receive, send)
            else:
                await refuse(error(refused.status, refused.says, CLOSE), scope, receive, send)
        except _Disconnected:
            return
        else:
            await self.app(scope, receive if body is None else _again(body, receive), send)

    def _check_header(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self.max_header_kb << 10:
            says = f"the request's header is larger than {self.max_header_kb} KiB (--max-header-kb)"
            raise BodyRefused(says, "header", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        self._check_size(int(headers.get("content-length", "0")))
        for name in ID_HEADERS:
            if len(headers.get(name, "")) > MAX_ID_CHARS:
                raise BodyRefused(f"{name}: longer than {MAX_ID_CHARS} characters")

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self.max_body_mb << 20:
            says = f"the request's body is larger than {self.max_body_mb} MiB (--max-body-mb)"
            raise BodyRefused(says, status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)

    async def _checked(self, scope: Scope, receive: Receive) -> bytes:
        is_form = Headers(scope=scope).get("content-type", "").startswith("multipart/")
        body = await self._whole(receive, is_form)
        if not body or is_form:
            return body
        parsed = _parsed(body)
        self.check.check(scope["path"].removeprefix(scope.get("root_path", "")), parsed)
        return body if len(body) <= LARGE_BYTES or body.isascii() else _in_ascii(parsed)

    async def _whole(self, receive: Receive, is_form: bool) -> bytes:
        """Read to the end even after a fault: a client that sends everything before it reads would miss the 400."""
        bounds = JsonBounds(self.check.limits.max_values, BYTES_PER_CHAR * self.check.limits.max_text_chars)
        held = BytesIO()  # one buffer: the memory of many small pieces would not return to the system
        refused: BodyRefused | None = None
        num_bytes, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            piece, more = message.get("body", b""), message.get("more_body", False)
            num_bytes += len(piece)
            self._check_size(num_bytes)
            if refused is None:
                held.write(piece)
                try:
                    if not is_form:
                        bounds.feed(piece)
                except BodyRefused as fault:
                    refused = fault
                    held = BytesIO()
        if refused is not None:
            raise refused
        return held.getvalue()


class _Disconnected(Exception):
    """The client is gone."""


def _parsed(body: bytes) -> object:
    """Parse JSON in strict UTF-8, which cannot carry halves of surrogate pairs."""
    try:
        return from_json(body.removeprefix(BYTE_ORDER_MARK), cache_strings="keys")
    except ValueError as fault:
        raise BodyRefused(f"the body is not JSON in UTF-8: {fault}") from None


def _in_ascii(parsed: object) -> bytes:
    """The body in ASCII: one wider letter would make Python hold all of it, media too, in up to four bytes for each."""
    return json.dumps(parsed).encode()


def _again(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body as one message, and then whatever else the client does."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again
