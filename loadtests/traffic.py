"""What a scenario's clients send, all drawn from its seed: questions about pictures or videos, mistakes, departures.

Arms get the same arrivals, words and mistakes but different pictures: both may be one server, which caches pictures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from random import Random
from typing import Any

from hidrop_loadtests.pictures import picture_url, video_url
from hidrop_loadtests.scenarios import Burst, Scenario

VOCABULARY = (
    "what where which how colour shape size object picture left right above below between red green blue yellow small "
    "large round square many near far the a is are and of in on with does it look like describe compare count name"
)
WORDS = tuple(VOCABULARY.split())
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Ask:
    """One request."""

    messages: Messages  # of a chat
    send_at: float | None = None  # seconds after the start; None: the client spaces requests by the arrivals
    cancel_after: float | None = None  # seconds until the client goes away; None: it stays
    bad: str | None = None  # name of what is wrong with the request, a key of mistakes(); None: nothing
    body: dict[str, Any] = field(default_factory=dict)  # fields that replace those of a good request


def first_turns(scenario: Scenario, picture_seed: int) -> list[Ask]:
    """The requests of a scenario, or the first turn of each of its conversations."""
    rng, bad = Random(scenario.seed), cycle(mistakes())
    return [_ask(scenario, picture_seed, index, rng, bad) for index in range(scenario.requests // scenario.turns)]


def next_turns(scenario: Scenario, asks: Sequence[Ask], answers: Sequence[str], turn: int) -> list[Ask]:
    """The same conversations one turn further, with the answers so far; an empty answer stays empty."""
    rng = Random(f"{scenario.seed} {turn}")
    return [
        Ask([*ask.messages, {"role": "assistant", "content": answer}, _user([_words(rng, scenario.words)])])
        for ask, answer in zip(asks, answers, strict=True)
    ]


@cache
def mistakes() -> dict[str, dict[str, Any]]:
    """Name of a mistake -> fields of a body that a server must answer with a 4xx."""
    picture = picture_url((0,), 64)
    header, data = picture.split(",")
    return {
        "unknown option": {"vllm_xargs": {"hidrop_nonsense": 1}},
        "NaN budget": {"vllm_xargs": {"hidrop_keep": [float("nan")]}},
        "wrong type": {"temperature": "hot"},
        "negative length": {"max_completion_tokens": -1},
        "messages no list": {"messages": 5},
        "bad base64": {"messages": [_user([_image("data:image/png;base64,%%%%"), _text("what ?")])]},
        "truncated image": {"messages": [_user([_image(f"{header},{data[: len(data) // 8 * 4]}"), _text("what ?")])]},
        "not an image": {"messages": [_user([_image("data:image/png;base64,aGVsbG8="), _text("what ?")])]},
        "not a video": {"messages": [_user([_video("data:video/mp4;base64,aGVsbG8="), _text("what ?")])]},
        "file URL": {"messages": [_user([_image("file:///etc/hostname"), _text("what ?")])]},
        "loopback URL": {"messages": [_user([_image("http://127.0.0.1:1/a.png"), _text("what ?")])]},
        "too many images": {"messages": [_user([*[_image(picture)] * 40, _text("what ?")])]},
        "prompt too long": {"messages": [_user([_text("what " * 150_000)])]},
    }


def _ask(scenario: Scenario, picture_seed: int, index: int, rng: Random, bad: Iterator[str]) -> Ask:
    draw, moment, question = rng.random(), rng.random(), _words(rng, scenario.words)
    send_at = _send_at(scenario, index)
    if draw < scenario.bad_share:
        name = next(bad)
        return Ask([_user([_text("what ?")])], send_at, bad=name, body=mistakes()[name])
    leaves = draw < scenario.bad_share + scenario.cancel_share
    cancel_after = moment * scenario.cancel_within_seconds if leaves else None
    return Ask([_user([*_media(scenario, (scenario.seed, picture_seed, index)), question])], send_at, cancel_after)


def _media(scenario: Scenario, seed: tuple[int, int, int]) -> list[dict[str, Any]]:
    sizes = scenario.video_side, scenario.video_frames
    videos = [_video(video_url((*seed, number), *sizes)) for number in range(scenario.videos)]
    return [*videos, *(_image(picture_url((*seed, number), scenario.image_side)) for number in range(scenario.images))]


def _send_at(scenario: Scenario, index: int) -> float | None:
    arrivals = scenario.arrivals
    return index // arrivals.at_once * arrivals.every_seconds if isinstance(arrivals, Burst) else None


def _words(rng: Random, count: int) -> dict[str, Any]:
    return _text(" ".join(rng.choices(WORDS, k=count)))


def _user(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "user", "content": parts}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}
