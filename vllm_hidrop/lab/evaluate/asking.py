"""Asks an OpenAI-compatible endpoint, several questions at a time, greedily. Knows no task's rules."""

import base64
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any

from openai import APIConnectionError, InternalServerError, OpenAI, OpenAIError, RateLimitError

from vllm_hidrop.lab.evaluate.samples import Sample

REQUEST_SECONDS = 300.0
RETRY_SECONDS = (0.5, 2.0)
"""Pauses before the second and the third try."""
PASSING = (APIConnectionError, InternalServerError, RateLimitError)
"""What another try may mend; a 400 stays a 400."""
TYPES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


@dataclass(frozen=True)
class Answer:
    """What asking one sample gave: a text or an error; ``vision_tokens`` is the mean over layers, if reported."""

    id: str
    text: str | None = None
    vision_tokens: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Endpoint:
    """Where and as what to ask.

    Attributes:
        url: with or without ``/v1``.
        name: the model's; the first one served when None.
        xargs: sent as ``vllm_xargs``; nothing is sent when empty, so that any server will do.
    """

    url: str
    api_key: str = "none"
    name: str | None = None
    xargs: Mapping[str, Any] | None = None

    @cached_property
    def client(self) -> OpenAI:
        """One client for all threads."""
        base_url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1"
        return OpenAI(base_url=base_url, api_key=self.api_key, max_retries=0, timeout=REQUEST_SECONDS)

    @cached_property
    def card(self) -> dict[str, Any]:
        """The model's entry in ``/v1/models``; empty when there is none and the name is given.

        Raises:
            ValueError: no name given and no list, or the name is not in the list.
        """
        try:
            cards = [card.model_dump() for card in self.client.models.list().data]
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


def ask_all(endpoint: Endpoint, samples: Sequence[Sample], max_tokens: int, concurrency: int) -> Iterator[Answer]:
    """Answers as they come; never more than ``concurrency`` requests at once. Leaving early asks no more."""
    waiting: SimpleQueue[Sample] = SimpleQueue()
    answers: SimpleQueue[Answer | BaseException] = SimpleQueue()
    for sample in samples:
        waiting.put(sample)

    def work() -> None:
        try:
            while True:
                answers.put(ask(endpoint, waiting.get_nowait(), max_tokens))
        except Empty:
            return
        except BaseException as error:  # raised where it is waited for
            answers.put(error)

    # Daemons: an answer that nobody waits for any more, after Ctrl-C, does not keep the process.
    for _ in range(min(concurrency, len(samples))):
        threading.Thread(target=work, name="hidrop-eval", daemon=True).start()
    try:
        for _ in samples:
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        with suppress(Empty):
            while True:
                waiting.get_nowait()


def ask(endpoint: Endpoint, sample: Sample, max_tokens: int) -> Answer:
    """One sample, tried again when the failure may pass; a lasting failure is an answer with ``error``."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return _ask_once(endpoint, sample, max_tokens)
        except (OpenAIError, ValueError) as error:
            if pause is None or not isinstance(error, PASSING):
                return Answer(sample.id, error=str(error) or type(error).__name__)
        time.sleep(pause)
    raise AssertionError("the last try has no pause")


def _ask_once(endpoint: Endpoint, sample: Sample, max_tokens: int) -> Answer:
    text, report = reply_to(endpoint, sample, max_tokens)
    return Answer(sample.id, text, mean_vision_tokens(report))


def reply_to(endpoint: Endpoint, sample: Sample, max_tokens: int) -> tuple[str, dict[str, Any] | None]:
    """The answer to one sample, asked once, and the server's report of it, if there is one.

    Raises:
        OpenAIError: the request failed.
        ValueError: the reply has no text.
    """
    content = [
        {"type": "image_url", "image_url": {"url": data_url(sample.image())}},
        {"type": "text", "text": sample.question},
    ]
    messages: Any = [{"role": "user", "content": content}]
    reply = endpoint.client.chat.completions.create(
        model=endpoint.model,
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"vllm_xargs": dict(endpoint.xargs)} if endpoint.xargs else None,
    )
    choices = getattr(reply, "choices", None)
    if not choices or choices[0].message.content is None:
        raise ValueError("the server's reply has no text")
    return choices[0].message.content.strip(), (reply.model_extra or {}).get("hidrop")


def mean_vision_tokens(report: Mapping[str, Any] | None) -> float | None:
    """Vision tokens held per layer, the mean over layers, as the server reports them; None without a report."""
    if not report:
        return None
    layers = [stage["end_layer"] - stage["first_layer"] for stage in report["stages"]]
    kept = [stage["kept"] for stage in report["stages"]]
    return float(sum(n * width for n, width in zip(kept, layers, strict=True)) / sum(layers))


def data_url(image: bytes) -> str:
    """An image file as a URL; its type is read from its first bytes.

    Raises:
        ValueError: not a known image file.
    """
    for start, kind in TYPES.items():
        if image.startswith(start):
            return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    raise ValueError(f"expected a PNG, JPEG, GIF or WebP image, it starts with {image[:4]!r}")
