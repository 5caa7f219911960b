"""No route fetches what it should not: a listener on loopback hears nothing, whichever door is tried."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.server.harness import Server
from tests.server.http.hostile import routes

pytestmark = pytest.mark.server

ID = "x"
IGNORED = "where no media are"
"""In a field that a route does not have, and another has for texts or for sound that is to be made."""


class Listener:
    """Counts connections to a port, and lets go of each at once."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}/picture"
        self.heard = 0

    def listen(self) -> None:
        while True:
            try:
                self.sock.accept()[0].close()
            except OSError:
                return
            self.heard += 1


@contextmanager
def listening() -> Iterator[Listener]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        listener = Listener(sock)
        thread = threading.Thread(target=listener.listen, daemon=True)
        thread.start()
        yield listener
        sock.shutdown(socket.SHUT_RDWR)
    thread.join()


def parts(url: str) -> dict[str, dict[str, Any]]:
    """Everything in a message that could lead somebody to a URL."""
    return {
        "image_pil": {"type": "image_pil", "image_pil": url},
        "image_pil without a type": {"image_pil": url},
        "image_pil by a uuid": {"type": "text", "text": "x", "uuid": "1", "image_pil": url},
        "image_url": {"type": "image_url", "image_url": {"url": url}},
        "image_url without a type": {"image_url": url},
        "image_url by a uuid": {"type": "text", "text": "x", "uuid": "1", "image_url": url},
        "input_image": {"type": "input_image", "image_url": url, "detail": "auto"},
        "input_file": {"type": "input_file", "file_url": url},
        "image": {"type": "image", "source": {"type": "url", "url": url}},
        "document": {"type": "document", "source": {"type": "url", "url": url}},
        "tool_result": {
            "type": "tool_result",
            "tool_use_id": "a",
            "content": [{"type": "image", "source": {"type": "url", "url": url}}],
        },
        "image_embeds": {"type": "image_embeds", "image_embeds": url},
        "audio_url": {"type": "audio_url", "audio_url": {"url": url}},
        "video_url": {"type": "video_url", "video_url": {"url": url}},
        "video_url by a uuid": {"uuid": "1", "video_url": url},
    }


def messages(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, part in parts(url).items():
        yield name, {"role": "user", "content": [part, {"type": "text", "text": "what ?"}]}
        yield f"{name} in a tool's message", {"role": "tool", "tool_call_id": "a", "content": [part]}
        yield f"{name} in a system message", {"role": "system", "content": [part]}


def places(base: dict[str, Any], url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Bodies of one route with a URL wherever some route looks for one."""
    user = {"role": "user", "content": "what ?"}
    for name, message in messages(url):
        yield name, {**base, "messages": [message, user]}
        yield f"{name} of a batch", {**base, "messages": [[message, user]]}
        yield f"{name} of responses", {**base, "input": [message]}
        yield f"{name} before", {**base, "previous_input_messages": [message]}
    for name, part in parts(url).items():
        output = {"type": "function_call_output", "call_id": "a", "output": [part]}
        yield f"{name} of a function", {**base, "input": [output]}
        yield f"{name} of a system prompt", {**base, "system": [part]}
        yield f"{name} {IGNORED}", {**base, "prompt": [part], "query": part, "items": [part]}
        yield f"{name} of a document", {**base, "documents": [{"content": [part]}], "queries": {"content": [part]}}
    yield f"audio {IGNORED}", {**base, "audio": url}
    for name in ("images", "videos", "multi_modal_data", "image_url", "image", "image_pil", "prompt_embeds"):
        yield f"{name} of a body", {**base, name: [url]}
        yield f"{name} of a body as it is", {**base, name: url}
        yield f"{name} of a body by kinds", {**base, name: {"image": url}}


def test_every_route_with_a_body_is_one_that_is_tried_here(server: Server) -> None:
    document = server.http.get("/openapi.json").json()["paths"]
    with_body = {path for path, methods in document.items() for method in methods.values() if "requestBody" in method}
    assert with_body == set(routes(ID))


@pytest.mark.parametrize("path", routes(ID))
def test_no_route_fetches_from_loopback(server: Server, path: str) -> None:
    refused = server.metric("vllm_hidrop_refused_requests_total", reason="media")
    with listening() as listener:
        for name, body in places(routes(server.model)[path], listener.url):
            response = server.http.post(path, json=body)
            assert response.status_code in (200, 400, 501), f"{name}: {response.text[:300]}"
            assert response.status_code != 200 or IGNORED in name, f"{name}: answered without it"
        assert listener.heard == 0
    assert server.metric("vllm_hidrop_refused_requests_total", reason="media") > refused + 30
