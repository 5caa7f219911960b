"""The life of a request: admitted or refused, counted, and ended with an answer when its time is over."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hidrop_server.http.answers import PROBES, OnRefused, error, is_metrics, refuse

END_SECONDS = 3.0  # for a request that is given up to end itself, and for its client to take the last message
POLL_SECONDS = 0.05
RETRY_AFTER_SECONDS = "1"  # a full queue empties request by request, and a router asks another server
GOING_AWAY = "this server is shutting down"


class InFlight:
    """The requests between their header and the end of their answer. Made, and counted, in the event loop's thread."""

    def __init__(self) -> None:
        self.count = 0
        self.draining = False  # whether the server is ending: nothing is admitted any more
        self.out_of_time = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def drain(self, seconds: float, is_lost: Callable[[], bool]) -> None:
        """Admit no more and wait until all are answered; give up those that are not after ``seconds``.

        Called from a thread, while the event loop goes on. ``is_lost`` tells whether no answer can come any more;
        giving up takes at most :data:`END_SECONDS` more.
        """
        self.draining = True
        self._wait(seconds, is_lost)
        self._loop.call_soon_threadsafe(self.out_of_time.set)
        self._wait(END_SECONDS, lambda: False)

    def _wait(self, seconds: float, is_over: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while self.count and not is_over() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)


class Exchanges:
    """Admits requests while the server does not drain, and ends each that takes too long.

    Time runs from the header to the last byte of the answer. When it is over, an answer that has not begun becomes a
    504, or a 503 if the server is ending, and a stream ends with an error event. The application sees the client hang
    up, for which vLLM's routes abort, whether they compute, stream or wait for a body. Every 503 has a ``Retry-After``.
    Probes and ``/metrics`` are always answered and never counted.
    """

    def __init__(self, app: ASGIApp, in_flight: InFlight, seconds: float, on_refused: OnRefused) -> None:
        self.app = app
        self.in_flight = in_flight
        self.seconds = seconds
        self.on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, unless the server is ending: then 503."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path in PROBES or is_metrics(path):
            await self.app(scope, receive, send)
            return
        if self.in_flight.draining:
            await refuse(_going_away(), scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        self.in_flight.count += 1
        try:
            await self._run(exchange)
        finally:
            self.in_flight.count -= 1

    async def _run(self, exchange: "_Exchange") -> None:
        task = asyncio.ensure_future(self.app(exchange.scope, exchange.receive, exchange.send))
        out_of_time = asyncio.ensure_future(self.in_flight.out_of_time.wait())
        try:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait({task, out_of_time}, timeout=self.seconds or None, return_when=first)
            if not task.done():
                exchange.expired.set()
                last_words = _going_away() if out_of_time.done() else self._too_late()
                with suppress(TimeoutError):
                    async with asyncio.timeout(END_SECONDS):
                        await exchange.last_words(last_words)
                        await asyncio.wait({task})
        finally:
            task.cancel()
            out_of_time.cancel()
            ended, _ = await asyncio.gather(task, out_of_time, return_exceptions=True)
        if isinstance(ended, Exception) and not exchange.expired.is_set():
            raise ended

    def _too_late(self) -> JSONResponse:
        self.on_refused("deadline")
        says = f"the request took longer than {self.seconds:g} s (--request-timeout)"
        return error(HTTPStatus.GATEWAY_TIMEOUT, says)


class _Exchange:
    """One request's ``receive`` and ``send``, which can be taken from the application."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self.expired = asyncio.Event()  # set: the application hears that the client is gone, and can send nothing
        self._has_started = False
        self._is_event_stream = False

    async def receive(self) -> Message:
        """The next message of the client; a disconnect once the request has expired."""
        theirs = asyncio.ensure_future(self._receive())
        ours = asyncio.ensure_future(self.expired.wait())
        try:
            await asyncio.wait({theirs, ours}, return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"} if self.expired.is_set() else theirs.result()
        finally:
            theirs.cancel()
            ours.cancel()

    async def send(self, message: Message) -> None:
        """Send the application's message; OSError once the request has expired."""
        if self.expired.is_set():
            raise OSError("this request has been given up")
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            self._has_started = True
            self._is_event_stream = headers.get("content-type", "").startswith("text/event-stream")
            if message["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
                headers.setdefault("Retry-After", RETRY_AFTER_SECONDS)
        await self._send(message)

    async def last_words(self, response: JSONResponse) -> None:
        """Answer in place of the application, or end the stream that it has begun."""
        if not self._has_started:
            await response(self.scope, self._receive, self._send)
        elif self._is_event_stream:
            event = b"data: " + bytes(response.body) + b"\n\ndata: [DONE]\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        # Anything else has promised a length it will not keep: the server closes the connection.


def _going_away() -> JSONResponse:
    headers = {"Retry-After": RETRY_AFTER_SECONDS, "Connection": "close"}
    return error(HTTPStatus.SERVICE_UNAVAILABLE, GOING_AWAY, headers)
