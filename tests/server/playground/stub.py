"""A server without a model: it gives the page and answers its questions with a report of the test's own."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from hidrop_server.playground.page import build
from vllm_hidrop.plan.grid import Grid

NUM_LAYERS = 8


@dataclass
class Stub:
    """What is answered, and what was asked.

    ``grids`` are of the prompt's one image or of the frames of its one video, ``kept`` their tokens in the second of
    two stages; the first runs ``num_tokens`` each.
    """

    grids: Sequence[Grid | None]
    kept: Sequence[Sequence[int]]
    num_tokens: int
    modalities: Sequence[str] = ("image",)
    pictures: str = "any size"
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)

    def card(self) -> dict[str, Any]:
        described = {
            "method": "fastv",
            "preset": None,
            "request_methods": ["fastv"],
            "modalities": self.modalities,
            "pictures": self.pictures,
            "schedule": {"num_layers": NUM_LAYERS},
            "stages": [{"keep": "all"}, {"keep": 0.5}],
        }
        return {"data": [{"id": "stub", "hidrop": described}]}

    def report(self) -> dict[str, Any]:
        is_video = len(self.grids) > 1
        every = [list(range(self.num_tokens))] * len(self.grids)
        stages = [
            {"first_layer": first, "end_layer": first + 4, "kept": sum(map(len, kept)), "patches": kept}
            for first, kept in ((0, every), (4, self.kept))
        ]
        spans = [
            {
                "item": 0,
                "frame": frame if is_video else None,
                "tokens": self.num_tokens,
                "grid": grid.dump() if grid else None,
            }
            for frame, grid in enumerate(self.grids)
        ]
        return {"vision_tokens": self.num_tokens * len(self.grids), "stages": stages, "spans": spans}


@contextmanager
def answering(stub: Stub) -> Iterator[Stub]:
    """Serve it on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page, headers = build()
            if self.path == "/playground":
                self._answer(page, headers | {"Content-Type": "text/html"})
            else:
                self._answer(json.dumps(stub.card()), {"Content-Type": "application/json"})

        def do_POST(self) -> None:
            stub.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            chunk = {"choices": [{"delta": {"content": "yes"}}], "hidrop": stub.report()}
            self._answer(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", {"Content-Type": "text/event-stream"})

        def _answer(self, text: str, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        stub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield stub
        finally:
            server.shutdown()
            thread.join()
