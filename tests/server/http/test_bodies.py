"""A body is read whole, checked, and handed on as it came; around a small application, no engine."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.types import Message, Scope

from hidrop_server.http.bodies import LARGE_BYTES, Bodies
from hidrop_server.http.body_check import BodyCheck
from hidrop_server.http.body_limits import BodyLimits
from hidrop_server.media.parts import MediaParts
from tests.server.http.fields import typed_fields

MAX_VALUES = 1024


class Told(Exception):
    """What the client was told: a status and a body."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


def application(refused: list[str]) -> Bodies:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def echo(raw: Request) -> Any:
        return {"length": len(await raw.body()), "body": await raw.json() if await raw.body() else None}

    check = BodyCheck(BodyLimits.of(MAX_VALUES, 4096, 64), MediaParts(["image"]), typed_fields())
    return Bodies(app, check, max_header_kb=4, max_body_mb=32, on_refused=refused.append)


class Exchange:
    """One request, given piece by piece."""

    def __init__(self, pieces: Sequence[bytes], headers: dict[str, str] | None = None) -> None:
        self.pieces = list(pieces)
        self.num_read = 0
        self.ends = True
        self.sent: list[Message] = []
        self.refused: list[str] = []
        found = {"content-type": "application/json", **(headers or {})}
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in found.items()],
        }

    async def receive(self) -> Message:
        if self.num_read == len(self.pieces):
            return {"type": "http.disconnect"}
        piece = self.pieces[self.num_read]
        self.num_read += 1
        return {"type": "http.request", "body": piece, "more_body": not self.ends or self.num_read < len(self.pieces)}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def run(self) -> Told:
        asyncio.run(application(self.refused)(self.scope, self.receive, self.send))
        body = b"".join(message.get("body", b"") for message in self.sent)
        return Told(self.sent[0]["status"], json.loads(body))


BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "é"}]}


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_body_in_pieces_arrives_whole(size: int) -> None:
    body = json.dumps(BODY, ensure_ascii=False).encode()
    told = Exchange([body[start : start + size] for start in range(0, len(body), size)]).run()
    assert (told.status, told.body) == (200, {"length": len(body), "body": BODY})


def test_a_byte_order_mark_and_no_body_at_all_are_taken() -> None:
    assert Exchange([b"\xef\xbb\xbf" + json.dumps(BODY).encode()]).run().status == 200
    assert Exchange([b""]).run().body == {"length": 0, "body": None}


def test_a_large_body_with_one_wide_letter_arrives_in_ascii() -> None:
    """Python holds a text in as many bytes a letter as its widest takes, a picture beside it too."""
    part = {"type": "image_url", "image_url": {"url": "x" * LARGE_BYTES}}
    body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "\U0001f600"}]}]}
    told = Exchange([json.dumps(body, ensure_ascii=False).encode()]).run()
    assert told.body == {"length": len(json.dumps(body)), "body": body}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b'{"a": "\\ud800"}', "UTF-8"),
        (b'{"\\udc00": 1}', "UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b'{"hidrop": "off"}', "vllm_xargs"),
    ],
)
def test_what_is_not_taken_is_a_400(body: bytes, says: str) -> None:
    exchange = Exchange([body])
    told = exchange.run()
    assert told.status == 400
    assert says in told.body["error"]["message"]
    assert len(exchange.refused) == 1


def test_a_body_refused_at_its_beginning_is_read_to_its_end() -> None:
    exchange = Exchange([b"[" * 200, *[b"x" * 1000] * 50])
    assert exchange.run().status == 400
    assert exchange.num_read == 51


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x", "text/plain"])
def test_a_body_too_large_ends_with_the_first_byte_too_many(content_type: str) -> None:
    exchange = Exchange([b" " * (1 << 20)] * 40, {"content-type": content_type})
    told = exchange.run()
    assert (told.status, exchange.refused) == (413, ["body"])
    assert "--max-body-mb" in told.body["error"]["message"]
    assert b"close" in dict(exchange.sent[0]["headers"])[b"connection"]


def test_a_client_that_leaves_is_not_answered() -> None:
    exchange = Exchange([b"{"])
    exchange.ends = False
    asyncio.run(application(exchange.refused)(exchange.scope, exchange.receive, exchange.send))
    assert exchange.sent == []


@pytest.mark.parametrize("name", ["x-request-id", "x-session-id"])
def test_a_long_id_in_a_header_is_refused(name: str) -> None:
    told = Exchange([b"{}"], {name: "x" * 257}).run()
    assert (told.status, told.body["error"]["message"]) == (400, f"{name}: longer than 256 characters")
    assert Exchange([b"{}"], {name: "x" * 256}).run().status == 200


def test_a_form_with_files_is_left_alone() -> None:
    exchange = Exchange([b"no JSON"], {"content-type": "multipart/form-data; boundary=x"})
    with pytest.raises(ValueError, match="Expecting value"):
        exchange.run()
