"""A server that streams words slowly, refuses what is marked, and counts: for the client's side of a load test."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN_SECONDS = 0.01


@dataclass
class Stub:
    """A stub: its address, the bodies it got, how many streams their clients left; and what is wrong with it."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0
    token_seconds: float = TOKEN_SECONDS
    status: int = 200
    lost_tokens: int = 0
    dense: int = 300
    ready: bool = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def do_GET(self) -> None:
        done = len(self.stub.bodies)
        metrics = (
            "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0\n"
            "# TYPE vllm_hidrop_layer_tokens_run counter\n"
            f'vllm_hidrop_layer_tokens_run_total{{method="hidrop"}} {100 * done}\n'
            "# TYPE vllm_hidrop_layer_tokens_dense counter\n"
            f'vllm_hidrop_layer_tokens_dense_total{{method="hidrop"}} {self.stub.dense * done}\n'
            "# TYPE vllm:time_to_first_token_seconds histogram\n"
            f'vllm:time_to_first_token_seconds_bucket{{le="0.1"}} {done}\n'
            f'vllm:time_to_first_token_seconds_bucket{{le="+Inf"}} {done}\n'
            f"vllm:time_to_first_token_seconds_sum {0.02 * done}\nvllm:time_to_first_token_seconds_count {done}\n"
        )
        pages = {
            "/metrics": metrics,
            "/v1/models": json.dumps({"data": [{"id": "stub"}]}),
        }
        if self.path == "/ready":
            self._answer(200 if self.stub.ready else 503, b"{}")
            return
        self._answer(200 if self.path in pages else 404, pages.get(self.path, "").encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stub.bodies.append(body)
        if "vllm_xargs" in body and "hidrop_nonsense" in body["vllm_xargs"]:
            self._answer(400, b"{}")
            return
        if self.stub.status != 200:
            self._answer(self.stub.status, b"{}")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            self._stream(body["max_completion_tokens"])
        except OSError:
            self.stub.left += 1
        self.close_connection = True

    def _stream(self, tokens: int) -> None:
        for number in range(tokens - self.stub.lost_tokens):
            time.sleep(self.stub.token_seconds)
            self._event({"choices": [{"delta": {"content": f"w{number} "}}]})
        if self.stub.lost_tokens:
            self._event({"error": {"message": "the engine died"}})
            return
        self._event({"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": 7}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def stub_server() -> Iterator[Stub]:
    handler = type("Handler", (_Handler,), {})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.stub = Stub(f"http://127.0.0.1:{httpd.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        yield handler.stub  # type: ignore[attr-defined]
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
