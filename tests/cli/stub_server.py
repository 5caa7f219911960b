"""A server that answers every question with "red" in any form a command asks for, or never answers."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STAGE = {"first_layer": 0, "end_layer": 2, "kept": 100}
REPORT = {"stages": [STAGE], "kv_blocks": 1}


@dataclass
class Stub:
    """Its address; whether it answers questions; set once it was asked one; set by the test to let answers go."""

    answers: bool
    url: str = ""
    asked: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    stub: Stub

    def do_GET(self) -> None:
        pages = {
            "/v1/models": json.dumps(
                {
                    "object": "list",
                    "data": [{"id": "stub", "object": "model", "created": 0, "owned_by": "", "hidrop": {}}],
                }
            ),
            "/metrics": "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0\n",
            "/ready": "{}",
        }
        self._send(200 if self.path in pages else 404, pages.get(self.path, "").encode(), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stub.asked.set()
        if not self.stub.answers:
            self.stub.released.wait(60)
            return
        if not body.get("stream"):
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "red"}}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}
            self._send(200, json.dumps(reply | {"hidrop": REPORT}).encode(), "application/json")
            return
        tokens = body.get("max_completion_tokens", 1)
        events: list[dict[str, Any]] = [{"choices": [{"delta": {"content": "red "}}]}] * tokens
        events.append({"choices": [], "hidrop": REPORT, "usage": {"completion_tokens": tokens, "prompt_tokens": 7}})
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self._send(200, text.encode(), "text/event-stream")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def stub_server(answers: bool = True) -> Iterator[Stub]:
    """Serve on a free loopback port until left."""
    stub = Stub(answers)
    handler = type("Handler", (_Handler,), {"stub": stub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.daemon_threads = True
        stub.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        try:
            yield stub
        finally:
            stub.released.set()
            httpd.shutdown()
            thread.join()
