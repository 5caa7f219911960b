"""A small real HTTP server that answers OpenAI-shaped JSON by rule and counts what it is asked."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPORT = {
    "stages": [
        {"first_layer": 0, "end_layer": 2, "kept": 100},
        {"first_layer": 2, "end_layer": 8, "kept": 20},
    ]
}
MEAN_VISION_TOKENS = (2 * 100 + 6 * 20) / 8


@dataclass
class Stub:
    """``answer`` maps a question and how often it was asked before to a text, or to an HTTP status that fails."""

    answer: Callable[[str, int], str | int]
    reports: bool = True
    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    active: int = 0
    most_active: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of an answer."""
        question = body["messages"][0]["content"][1]["text"]
        with self.lock:
            before = self.asked[question]
            self.asked[question] += 1
            self.bodies.append(body)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        said = self.answer(question, before)
        with self.lock:
            self.active -= 1
        if isinstance(said, int):
            return said, {"error": {"message": f"status {said}"}}
        message = {"role": "assistant", "content": said}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "stub"}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        return 200, {**reply, "choices": choices, **({"hidrop": REPORT} if self.reports else {})}


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """Serve on a free loopback port until left."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(
                200, {"object": "list", "data": [{"id": "stub", "object": "model", "created": 0, "owned_by": "t"}]}
            )

        def do_POST(self) -> None:
            stub.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.send(*stub.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        stub.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield stub
        finally:
            server.shutdown()
            thread.join()
