"""Asks an OpenAI-compatible endpoint, several questions at a time, greedily."""

import asyncio
import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from openai import AsyncOpenAI, OpenAI, OpenAIError

from vllm_hidrop.lab.evaluate.samples import Sample

REQUEST_SECONDS = 300.0
MAX_RETRIES = 2
"""After a failure that may pass: no connection, a timeout, 408, 409, 429 and 5xx."""
TYPES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
Report = Mapping[str, Any]
"""A HiDrop server's report on one request."""


@dataclass(frozen=True)
class Answer:
    """What asking one sample gave: a text or an error; ``vision_tokens`` is the mean over layers, if reported."""

    id: str
    text: str | None = None
    vision_tokens: float | None = None
    error: str | None = None
    report: Report | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Endpoint:
    """Where and as what to ask: ``url`` with or without ``/v1``, the model's ``name`` (None: the first one served).

    ``xargs`` are sent as ``vllm_xargs``; when empty nothing is sent, so that any server will do.
    """

    url: str
    api_key: str = "none"
    name: str | None = None
    xargs: Mapping[str, Any] | None = None

    @property
    def client_settings(self) -> dict[str, Any]:
        """Arguments of the ``openai`` package's clients."""
        base_url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1"
        return {"base_url": base_url, "api_key": self.api_key, "timeout": REQUEST_SECONDS}

    @cached_property
    def card(self) -> dict[str, Any]:
        """The model's entry in ``/v1/models``; empty when there is none and the name is given.

        Raises ValueError: no name given and no list, or the name is not in the list.
        """
        try:
            with OpenAI(**self.client_settings, max_retries=0) as client:
                cards = [card.model_dump() for card in client.models.list().data]
        except (OpenAIError, AttributeError, TypeError, ValueError) as error:
            if self.name is not None:
                return {}
            raise ValueError(f"no model at {self.url}: {error}; name one with --model") from None
        named = [card for card in cards if self.name in (None, card["id"])]
        if not named:
            raise ValueError(
                f"{self.url} serves {', '.join(card['id'] for card in cards) or 'nothing'}, not {self.name}"
            )
        return named[0]

    @property
    def model(self) -> str:
        """The model's name."""
        return self.name or str(self.card["id"])


def ask_all(
    endpoint: Endpoint,
    samples: Sequence[Sample],
    max_tokens: int,
    concurrency: int,
    on_answer: Callable[[Sample, Answer], None],
) -> None:
    """Ask all samples, at most ``concurrency`` at once; ``on_answer`` gets each answer as it comes."""
    waiting = iter(samples)

    async def work(client: AsyncOpenAI) -> None:
        for sample in waiting:
            on_answer(sample, await _ask(client, endpoint, sample, max_tokens))

    async def work_all() -> None:
        async with AsyncOpenAI(**endpoint.client_settings, max_retries=MAX_RETRIES) as client:
            await asyncio.gather(*(work(client) for _ in range(min(concurrency, len(samples)))))

    asyncio.run(work_all())


async def _ask(client: AsyncOpenAI, endpoint: Endpoint, sample: Sample, max_tokens: int) -> Answer:
    """Ask one sample; a failure that retries do not mend is an answer with ``error``."""
    try:
        url = data_url(sample.image())
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample.question}]
        messages: Any = [{"role": "user", "content": content}]
        reply = await client.chat.completions.create(
            model=endpoint.model,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"vllm_xargs": dict(endpoint.xargs)} if endpoint.xargs else None,
        )
        choices = getattr(reply, "choices", None)
        if not choices or choices[0].message.content is None:
            raise ValueError("the server's reply has no text")
    except (OpenAIError, ValueError) as error:
        return Answer(sample.id, error=str(error) or type(error).__name__)
    report = (reply.model_extra or {}).get("hidrop")
    return Answer(sample.id, choices[0].message.content.strip(), mean_vision_tokens(report), report=report)


def mean_vision_tokens(report: Report | None) -> float | None:
    """Vision tokens held per layer, the mean over layers, of a server's report; None without one."""
    if not report:
        return None
    layers = [stage["end_layer"] - stage["first_layer"] for stage in report["stages"]]
    kept = [stage["kept"] for stage in report["stages"]]
    return float(sum(n * width for n, width in zip(kept, layers, strict=True)) / sum(layers))


def data_url(image: bytes) -> str:
    """An image file as a URL, its type read from its first bytes; ValueError where they are of no known image."""
    for start, kind in TYPES.items():
        if image.startswith(start):
            return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    raise ValueError(f"expected a PNG, JPEG, GIF or WebP image, it starts with {image[:4]!r}")
