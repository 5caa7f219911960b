"""A longest time for every request: a 504, or an error event if its stream has begun, and the engine's work is ended.

Knows ASGI and server-sent events; not the engine.
"""

import asyncio
import json
from contextlib import suppress
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hidrop_server.answers import OnRefused, error

END_SECONDS = 5.0
"""What an expired request gets to end itself, and its client to take the last words."""


class Deadline:
    """Gives up a request after so many seconds, counted from its header to the last byte of its answer.

    To the application the deadline is the client hanging up: vLLM's routes abort for that, whether they compute, stream
    or wait for a body.
    """

    def __init__(self, app: ASGIApp, seconds: float, on_refused: OnRefused) -> None:
        self.app = app
        self.seconds = seconds
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application until it ends or time is up."""
        if scope["type"] != "http" or self.seconds == 0:
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        task = asyncio.ensure_future(self.app(scope, exchange.receive, exchange.send))
        try:
            await asyncio.wait({task}, timeout=self.seconds)
            if not task.done():
                self.on_refused("deadline")
                exchange.hang_up()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._last_words(exchange, scope, receive, send), END_SECONDS)
                await asyncio.wait({task}, timeout=END_SECONDS)
        finally:
            task.cancel()
            (ended,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(ended, Exception) and not exchange.expired.is_set():
            raise ended

    async def _last_words(self, exchange: "_Exchange", scope: Scope, receive: Receive, send: Send) -> None:
        says = f"the request took longer than {self.seconds:g} s (--request-timeout)"
        response = error(HTTPStatus.GATEWAY_TIMEOUT, says)
        if not exchange.has_started:
            await response(scope, receive, send)
        elif exchange.is_event_stream:
            event = f"data: {json.dumps(json.loads(bytes(response.body)))}\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": event.encode(), "more_body": False})
        # Anything else has promised a length it will not keep: the server closes the connection.


class _Exchange:
    """One request's two directions, which can be taken from the application."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.expired = asyncio.Event()
        self.has_started = False
        self.is_event_stream = False

    def hang_up(self) -> None:
        """From now on the application hears that the client is gone, and nothing it says is sent."""
        self.expired.set()

    async def receive(self) -> Message:
        """What the client sends, until the deadline."""
        theirs = asyncio.ensure_future(self._receive())
        ours = asyncio.ensure_future(self.expired.wait())
        try:
            await asyncio.wait({theirs, ours}, return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"} if self.expired.is_set() else theirs.result()
        finally:
            theirs.cancel()
            ours.cancel()

    async def send(self, message: Message) -> None:
        """What the application answers, until the deadline."""
        if self.expired.is_set():
            raise OSError("the request's deadline has passed")
        if message["type"] == "http.response.start":
            self.has_started = True
            headers = dict(message.get("headers", ()))
            self.is_event_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        await self._send(message)
