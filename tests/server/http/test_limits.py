"""Our middlewares around a small application of the same kind, on real loopback HTTP; no engine."""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.middleware.cors import CORSMiddleware
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from hidrop_server.app import build_middlewares
from hidrop_server.http.access import Access
from hidrop_server.http.answers import DRAIN_MIB, DRAIN_SECONDS, Heads
from hidrop_server.http.bodies import Bodies
from hidrop_server.http.body_check import BodyCheck
from hidrop_server.http.body_limits import BodyLimits
from hidrop_server.http.exchanges import Exchanges, InFlight
from hidrop_server.http.typed_fields import TypedFields
from hidrop_server.media.parts import MediaParts
from hidrop_server.playground.page import PATH as PLAYGROUND
from hidrop_server.playground.page import router as playground
from hidrop_server.serving import HidropServingChat

PATIENCE = 30.0
"""Seconds; for what takes none on a machine that does not stall."""
DEADLINE = 0.5
ORIGIN = "https://here.example"


class Application:
    """A FastAPI application with vLLM's error handlers and our middlewares, on a port."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.in_flight: InFlight
        self.server: uvicorn.Server
        self.is_up = threading.Event()
        self.refused: list[str] = []
        self.ended = threading.Event()

    async def serve(self, sock: socket.socket) -> None:
        self.in_flight = InFlight()
        app = FastAPI()
        app.state.args = Namespace(log_error_stack=False)
        init_exception_handler(app)
        self.add_routes(app)
        refused = self.refused.append
        app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN], allow_methods=["*"])
        app.add_middleware(XRequestIdMiddleware)
        check = BodyCheck(BodyLimits.of(1024, 4096 * 8, 64), MediaParts([]), TypedFields([]))
        app.add_middleware(Bodies, check=check, max_header_kb=4, max_body_mb=1, on_refused=refused)
        app.add_middleware(Heads)
        app.add_middleware(Exchanges, in_flight=self.in_flight, seconds=self.seconds, on_refused=refused)
        app.add_middleware(Access, api_keys=["k1", "k2"], metrics_keys=["m"], on_refused=refused)
        build_middlewares(app)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, http="h11", log_level="error", lifespan="off"))
        serving = asyncio.ensure_future(self.server.serve([sock]))
        while not self.server.started:
            await asyncio.sleep(0.01)
        self.is_up.set()
        await serving

    def add_routes(self, app: FastAPI) -> None:
        @app.post("/v1/length")
        async def length(body: dict[str, Any]) -> int:
            return len(json.dumps(body))

        @app.post("/v1/wait")
        @with_cancellation
        async def wait(body: dict[str, Any], raw_request: Request) -> None:
            try:
                await asyncio.sleep(2 * PATIENCE)
            finally:
                self.ended.set()

        @app.post("/v1/stream")
        async def stream(raw_request: Request) -> StreamingResponse:
            return StreamingResponse(self.words(), media_type="text/event-stream")

        @app.get("/v1/full")
        async def full() -> JSONResponse:
            return JSONResponse({}, status_code=503)

        @app.get("/v1/raced")
        async def raced() -> None:
            object.__new__(HidropServingChat)._raise_if_error("error", "an id")

        @app.get("/v1/broken")
        async def broken() -> None:
            raise ArithmeticError("unforeseen")

        app.include_router(playground)
        for path in ("/health", "/ready", "/metrics", "/metrics/x", "/docs2", "/hidrop"):
            app.get(path)(lambda: "here")

    async def words(self) -> AsyncIterator[str]:
        try:
            while True:
                yield "data: word\n\n"
                await asyncio.sleep(0.05)
        finally:
            self.ended.set()


@contextmanager
def serving(seconds: float) -> Iterator[tuple[Application, int]]:
    application = Application(seconds)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(application.serve(sock)))
        thread.start()
        assert application.is_up.wait(PATIENCE)
        yield application, sock.getsockname()[1]
        application.server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Application, int]]:
    with serving(PATIENCE) as started:
        yield started


@pytest.fixture
def hurried() -> Iterator[tuple[Application, int]]:
    """With so little time that only what is to be late should be asked of it."""
    with serving(DEADLINE) as started:
        yield started


@pytest.fixture
def application(served: tuple[Application, int]) -> Application:
    application = served[0]
    application.refused.clear()
    return application


def client(port: int) -> httpx.Client:
    headers = {"Authorization": "Bearer k1", "Content-Type": "application/json"}
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=PATIENCE)


@pytest.fixture
def http(served: tuple[Application, int]) -> Iterator[httpx.Client]:
    with client(served[1]) as http:
        yield http


def message(response: httpx.Response) -> str:
    """Of an error in vLLM's shape."""
    error = response.json()["error"]
    assert error["code"] == response.status_code
    return str(error["message"])


def test_a_body_within_the_limit_is_read(http: httpx.Client) -> None:
    body = json.dumps({"prompt": "x" * 1_000_000})
    assert http.post("/v1/length", content=body).json() == len(body)
    assert http.post("/v1/length", content=iter([body.encode()])).json() == len(body)


def test_a_body_that_says_it_is_too_large_is_not_read(application: Application, http: httpx.Client) -> None:
    response = http.post("/v1/length", content=bytes(64 << 20))
    assert response.status_code == 413
    assert "1 MiB (--max-body-mb)" in message(response)
    assert application.refused == ["body"]


def test_a_body_that_does_not_say_how_large_it_is_is_cut_off(application: Application, http: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1 << 30:
            sent += 1 << 16
            yield bytes(1 << 16)

    response = http.post("/v1/length", content=endless())
    assert response.status_code == 413
    assert "1 MiB (--max-body-mb)" in message(response)
    assert sent < 2 * DRAIN_MIB << 20, "the server went on reading"
    assert application.refused == ["body"]


@pytest.mark.parametrize("states_length", [True, False])
@pytest.mark.parametrize(("key", "status"), [("k1", 413), ("wrong", 401)])
def test_a_client_that_sends_all_before_it_reads_gets_its_answer(
    application: Application, served: tuple[Application, int], states_length: bool, key: str, status: int
) -> None:
    """Python's own; a connection that is closed while it sends is reset, and the answer with it."""
    url = f"http://127.0.0.1:{served[1]}/v1/length"
    parts = bytes(64 << 20) if states_length else (bytes(1 << 20) for _ in range(64))
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, data=parts, headers=headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=PATIENCE)
    assert refused.value.code == status
    assert json.load(refused.value)["error"]["code"] == status
    assert refused.value.headers["Connection"] == "close"


def test_what_is_refused_is_not_read_for_ever(application: Application, served: tuple[Application, int]) -> None:
    head = "POST /v1/length HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k1\r\nContent-Length: 9999999999\r\n\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", served[1]), timeout=PATIENCE) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
        with suppress(ConnectionError):
            while sent < 8 * DRAIN_MIB << 20:
                sent += connection.send(bytes(1 << 20))
    assert sent < 4 * DRAIN_MIB << 20, "the server went on reading"


def test_who_asks_first_is_told_at_once(served: tuple[Application, int]) -> None:
    """With ``Expect``, as curl sends it: nothing is drained, because nothing comes."""
    head = "POST /v1/length HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", served[1]), timeout=PATIENCE) as connection:
        connection.sendall(head.encode())
        said = b""
        while part := connection.recv(10_000):
            said += part
    assert said.startswith(b"HTTP/1.1 401")
    assert time.monotonic() - began < DRAIN_SECONDS / 2


def answers_of_all_kinds(http: httpx.Client) -> dict[int, httpx.Response]:
    """One of every status that this application can give."""
    asked = [
        http.get("/health"),
        http.post("/v1/length", json=[]),
        http.get("/v1/nowhere"),
        http.put("/v1/length"),
        http.get("/hidrop", headers={"Authorization": "Bearer wrong"}),
        http.post("/v1/length", content=bytes(2 << 20)),
        http.get("/hidrop", headers={"X-Long": "x" * 5000}),
        http.get("/v1/full"),
        http.get("/v1/broken"),  # the last: uvicorn closes its connection
    ]
    return {answer.status_code: answer for answer in asked}


def test_every_answer_has_its_request_id_and_tells_browsers_who_may_read_it(
    hurried: tuple[Application, int], http: httpx.Client
) -> None:
    http.headers.update({"Origin": ORIGIN, "X-Request-Id": "mine"})
    answers = answers_of_all_kinds(http)
    with client(hurried[1]) as late:
        late.headers.update({"Origin": ORIGIN, "X-Request-Id": "mine"})
        answers[504] = late.post("/v1/wait", json={})
    assert sorted(answers) == [200, 400, 401, 404, 405, 413, 431, 500, 503, 504]
    for status, answer in answers.items():
        assert answer.headers.get("access-control-allow-origin") == ORIGIN, status
        assert answer.headers.get_list("x-request-id") == ["mine"], status


def test_a_preflight_needs_no_key_and_has_its_id(served: tuple[Application, int]) -> None:
    url = f"http://127.0.0.1:{served[1]}/v1/length"
    asks = {"Access-Control-Request-Method": "POST"}
    allowed = httpx.options(url, headers={**asks, "Origin": ORIGIN})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert allowed.headers["x-request-id"]
    assert httpx.options(url, headers={**asks, "Origin": "https://elsewhere.example"}).status_code == 400


def test_head_is_get_without_a_body(served: tuple[Application, int]) -> None:
    url = f"http://127.0.0.1:{served[1]}"
    for path in ("/health", "/ready", PLAYGROUND):
        head = httpx.head(url + path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-length"] == httpx.get(url + path).headers["content-length"]
    assert httpx.head(f"{url}/hidrop").status_code == 401, "a key is needed for it, too"


def test_a_header_over_the_limit_is_a_431(application: Application, http: httpx.Client) -> None:
    response = http.get("/hidrop", headers={"X-Long": "x" * 5000})
    assert response.status_code == 431
    assert "4 KiB (--max-header-kb)" in message(response)
    assert application.refused == ["header"]


def test_a_request_over_its_time_is_a_504_and_is_aborted(hurried: tuple[Application, int]) -> None:
    application, port = hurried
    with client(port) as http:
        response = http.post("/v1/wait", json={})
    assert response.status_code == 504
    assert "--request-timeout" in message(response)
    assert application.ended.wait(PATIENCE)
    assert application.refused == ["deadline"]


def test_a_stream_over_its_time_ends_with_an_error_event(hurried: tuple[Application, int]) -> None:
    application, port = hurried
    with client(port) as http:
        response = http.post("/v1/stream")
    assert response.status_code == 200
    *words, error, done, rest = response.text.split("\n\n")
    assert words
    assert set(words) == {"data: word"}
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 504
    assert (done, rest) == ("data: [DONE]", "")
    assert application.ended.wait(PATIENCE)


def test_a_body_that_never_ends_is_a_504(hurried: tuple[Application, int]) -> None:
    with socket.create_connection(("127.0.0.1", hurried[1]), timeout=PATIENCE) as connection:
        head = "POST /v1/length HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k1\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 504")


@pytest.mark.parametrize("path", ["/v1/full", "/v1/raced"])
def test_a_503_says_when_to_come_back(http: httpx.Client, path: str) -> None:
    response = http.get(path)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")


@pytest.fixture
def draining(application: Application) -> Iterator[None]:
    """Told to stop, with all the time there is."""
    in_flight = application.in_flight
    thread = threading.Thread(target=in_flight.drain, args=(PATIENCE, lambda: False))
    in_flight.count += 1  # else it is over at once
    thread.start()
    while not in_flight.draining:
        time.sleep(0.01)
    yield
    in_flight.count -= 1
    thread.join()
    while not in_flight.out_of_time.is_set():  # the loop's thread sets it
        time.sleep(0.01)
    in_flight.draining = False
    in_flight.out_of_time.clear()


@pytest.mark.usefixtures("draining")
def test_a_draining_server_admits_only_probes(application: Application, http: httpx.Client) -> None:
    response = http.post("/v1/length", json={})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert response.headers["Connection"] == "close"
    assert response.headers["X-Request-Id"]
    assert http.get("/ready").status_code == 200
    assert http.get("/metrics", headers={"Authorization": "Bearer m"}).status_code == 200
    assert application.in_flight.count == 1, "the fixture's own"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("seconds", "is_lost"), [(0.0, False), (PATIENCE, True)])
def test_what_is_not_answered_when_the_server_ends_is_told_so(is_stream: bool, seconds: float, is_lost: bool) -> None:
    """No limit of its own, no answer of its own: time is up, or the engine is lost."""
    sent: list[dict[str, Any]] = []

    async def ask() -> None:
        in_flight, begun = InFlight(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if is_stream:
                head = {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [(b"content-type", b"text/event-stream")],
                }
                await send(head)
            begun.set()
            while (await receive())["type"] != "http.disconnect":
                pass

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        exchanges = Exchanges(app, in_flight, seconds=0, on_refused=lambda reason: None)
        scope = {"type": "http", "path": "/v1/x", "headers": []}
        asked = asyncio.ensure_future(exchanges(scope, receive, send))
        await begun.wait()
        await asyncio.to_thread(in_flight.drain, seconds, lambda: is_lost)
        await asyncio.wait_for(asked, PATIENCE)
        assert in_flight.count == 0

    began = time.monotonic()
    asyncio.run(ask())
    assert time.monotonic() - began < PATIENCE
    assert sent[0]["status"] == (200 if is_stream else 503)
    event, *rest = sent[-1]["body"].decode().split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == 503
    assert rest == (["data: [DONE]", ""] if is_stream else [])


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/health", {}, 200),
        ("/ready", {}, 200),
        (PLAYGROUND, {}, 200),
        (f"{PLAYGROUND}/", {}, 401),
        ("/hidrop", {}, 401),
        ("/docs2", {}, 401),
        ("/nowhere", {}, 401),
        ("/health/", {}, 401),
        ("/healthy", {}, 401),
        ("//health", {}, 401),
        ("/hidrop", {"Authorization": "Bearer k2"}, 200),
        ("/hidrop", {"Authorization": "bearer k2"}, 200),
        ("/hidrop", {"X-Api-Key": "k2"}, 200),
        ("/hidrop", {"Authorization": "Bearer k3"}, 401),
        ("/hidrop", {"Authorization": "Bearer"}, 401),
        ("/hidrop", {"Authorization": "Basic k1"}, 401),
        ("/hidrop", {"Authorization": "k1"}, 401),
        ("/hidrop", {"Authorization": "Bearer m"}, 401),
        ("/metrics", {}, 401),
        ("/metrics", {"Authorization": "Bearer k1"}, 401),
        ("/metrics", {"Authorization": "Bearer m"}, 200),
        ("/metrics/x", {}, 401),
        ("/metricsx", {}, 401),
    ],
)
def test_every_path_but_the_open_ones_needs_its_key(
    served: tuple[Application, int], path: str, headers: dict[str, str], status: int
) -> None:
    response = httpx.get(f"http://127.0.0.1:{served[1]}{path}", headers=headers, timeout=PATIENCE)
    assert response.status_code == status
    if status == 401:
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_options_is_no_way_around_the_key(served: tuple[Application, int]) -> None:
    url = f"http://127.0.0.1:{served[1]}"
    assert httpx.options(f"{url}/metrics").status_code == 401
    assert httpx.options(f"{url}/hidrop", headers={"Origin": "https://elsewhere.example"}).status_code == 401


def test_a_key_that_is_not_ascii_is_only_wrong(served: tuple[Application, int]) -> None:
    headers = {b"Authorization": "Bearer schlüssel".encode("latin-1")}
    assert httpx.get(f"http://127.0.0.1:{served[1]}/hidrop", headers=headers).status_code == 401
