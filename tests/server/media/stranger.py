"""A web server that the server under test may be sent to."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.server.harness import picture

PICTURE = picture()
MEBIBYTES = 21
"""Of its large file."""


class Files(BaseHTTPRequestHandler):
    """Answers by path, and remembers who asked."""

    seen: list[str]
    port: int

    def do_GET(self) -> None:
        self.seen.append(f"{self.headers['Host'].partition(':')[0]}{self.path}")
        name, _, rest = self.path.removeprefix("/").partition("/")
        if name == "to":
            self.send_response(302)
            self.send_header("Location", rest.replace("@", f":{self.port}"))
            self.end_headers()
        elif name == "large":
            self.send_response(200)
            self.end_headers()
            for _ in range(MEBIBYTES):
                self.wfile.write(bytes(1 << 20))
        elif name == "declared":
            self.send_response(200)
            self.send_header("Content-Length", str(MEBIBYTES << 20))
            self.end_headers()
        else:
            self.send_response(200 if name == "picture" else 404)
            self.end_headers()
            self.wfile.write(PICTURE)

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""


@contextmanager
def stranger() -> Iterator[type[Files]]:
    """Serve on loopback."""
    Files.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        Files.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield Files
        finally:
            server.shutdown()
            thread.join()
