"""What the server tests send, and how they read what comes back."""

import base64
import io
import random
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx
from openai import OpenAI
from PIL import Image, ImageDraw
from prometheus_client.parser import text_string_to_metric_families

from vllm_hidrop.plan.schedule import Schedule

IMAGE_TOKENS = 576
QUESTION = "what colour is the circle ?"
REPORT_FIELDS = {
    "method",
    "preset",
    "mode",
    "fallback",
    "prompt_tokens",
    "vision_tokens",
    "reused_tokens",
    "reuse_off",
    "engine",
    "stages",
    "kv_blocks",
    "kv_blocks_returned",
    "selection_ms",
    "kv_blocks_dense",
    "cut_layer",
    "exit_layer",
    "layer_tokens",
    "layer_tokens_dense",
    "kv_bytes",
    "kv_bytes_dense",
    "state_bytes",
    "encoded_images",
    "prefill_flops",
    "prefill_flops_dense",
}
STAGE_FIELDS = {"first_layer", "end_layer", "kept", "rows", "reused", "cached", "kv_blocks"}


@dataclass(frozen=True)
class Server:
    """A running server, two clients of it, and its key."""

    url: str
    http: httpx.Client
    openai: OpenAI
    key: str = "none"
    metrics_headers: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def model(self) -> str:
        return str(self.http.get("/v1/models").json()["data"][0]["id"])

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule.load(self.http.get("/hidrop").json()["schedule"])

    def body(self, images: Sequence[str], text: str = QUESTION, **more: Any) -> dict[str, Any]:
        """A greedy chat request: the images, then the text."""
        return {
            "model": self.model,
            "messages": [user(images, text)],
            "max_tokens": 6,
            "temperature": 0,
            **more,
        }

    def chat(self, images: Sequence[str], text: str = QUESTION, **more: Any) -> dict[str, Any]:
        """The whole answer to a request that must succeed."""
        response = self.http.post("/v1/chat/completions", json=self.body(images, text, **more))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample of /metrics by name and labels."""
        families = text_string_to_metric_families(self.http.get("/metrics", headers=self.metrics_headers).text)
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric over all series that have these labels."""
        wanted = set(labels.items())
        values = [value for (found, have), value in self.metrics().items() if found == name and wanted <= set(have)]
        assert values, f"/metrics has no {name} with {labels}"
        return sum(values)


def user(images: Sequence[str], text: str) -> dict[str, Any]:
    """One message of the user."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def content(answer: dict[str, Any]) -> str:
    """The text of a chat answer."""
    return str(answer["choices"][0]["message"]["content"])


def picture(seed: int = 0, image_format: str = "PNG") -> bytes:
    """An image file: one disc on a ground."""
    rng = random.Random(seed)
    image = Image.new("RGB", (192, 192), tuple(rng.randrange(256) for _ in range(3)))
    x, y = rng.randrange(20, 100), rng.randrange(20, 100)
    ImageDraw.Draw(image).ellipse((x, y, x + 60, y + 60), tuple(rng.randrange(256) for _ in range(3)))
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


def data_url(file: bytes) -> str:
    """A file as a URL."""
    return "data:image/png;base64," + base64.b64encode(file).decode()


def image_url(seed: int = 0) -> str:
    """An image as a URL."""
    return data_url(picture(seed))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises a large image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def damaged(file: bytes, rng: random.Random) -> bytes:
    """The file with some bytes changed, most of them near its start, and sometimes cut short."""
    bytes_ = bytearray(file)
    for _ in range(rng.choice((1, 2, 5, 20))):
        bytes_[rng.randrange(min(len(bytes_), rng.choice((30, 60, 400, len(bytes_)))))] = rng.randrange(256)
    return bytes(bytes_[: rng.randrange(len(bytes_))] if rng.random() < 0.3 else bytes_)


def check_report(report: dict[str, Any], answer: dict[str, Any], schedule: Schedule) -> None:
    """What must hold of every report, whatever was pruned."""
    assert report.keys() == REPORT_FIELDS
    assert report["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert [s["first_layer"] for s in report["stages"]] == [s.first_layer for s in schedule.stages]
    assert [s["end_layer"] for s in report["stages"]] == list(schedule.end_layers)
    text_tokens = report["prompt_tokens"] - report["vision_tokens"]
    for stage in report["stages"]:
        assert stage.keys() == STAGE_FIELDS
        assert stage["rows"] == text_tokens + stage["kept"]
        assert stage["kv_blocks"] > 0
        assert 0 <= stage["reused"] < stage["rows"]
    rows = sum((s["rows"] - s["reused"]) * (s["end_layer"] - s["first_layer"]) for s in report["stages"])
    assert report["layer_tokens"] == rows
    assert report["layer_tokens_dense"] == report["prompt_tokens"] * schedule.num_layers
    assert report["kv_blocks"] == sum(s["kv_blocks"] for s in report["stages"])
    assert report["kv_blocks"] <= report["kv_blocks_dense"]
    assert report["kv_bytes"] % report["kv_blocks"] == 0
    assert 0 < report["prefill_flops"] <= report["prefill_flops_dense"]


def kept(report: dict[str, Any]) -> list[int]:
    """Vision tokens held in each stage."""
    return [stage["kept"] for stage in report["stages"]]
