"""Load test scenarios, read from TOML: traffic, bounds, a goal for each request, thresholds for the whole run."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SHIPPED = Path(__file__).with_name("scenarios.toml")
MOST_REQUESTS = 100_000
MOST_SECONDS = 24 * 3600.0
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Closed(_Data):
    """A fixed number of clients, each sending its next request when it has its answer."""

    kind: Literal["closed"]
    at_once: int = Field(ge=1, le=4096)

    def seconds(self, requests: int) -> float:
        """0: the server's answers decide when requests are sent, so nothing is known before."""
        return 0.0


class Poisson(_Data):
    """Independent clients: exponentially distributed gaps."""

    kind: Literal["poisson"]
    requests_per_second: Positive

    def seconds(self, requests: int) -> float:
        """How long sending takes on average, without waiting for answers."""
        return requests / self.requests_per_second


class Burst(_Data):
    """Groups of requests at once, at fixed times."""

    kind: Literal["burst"]
    at_once: int = Field(ge=1)
    every_seconds: Positive

    def seconds(self, requests: int) -> float:
        """How long sending takes, without waiting for answers."""
        return (requests - 1) // self.at_once * self.every_seconds


class Ramp(_Data):
    """A rate that changes linearly from the first request to the last; vLLM's client takes whole numbers only."""

    kind: Literal["ramp"]
    from_requests_per_second: int = Field(ge=1)
    to_requests_per_second: int = Field(ge=1)

    def seconds(self, requests: int) -> float:
        """How long sending takes at most, without waiting for answers."""
        return requests / min(self.from_requests_per_second, self.to_requests_per_second)


Arrivals = Annotated[Closed | Poisson | Burst | Ramp, Field(discriminator="kind")]


class Goal(_Data):
    """How fast an answer must be to count for goodput."""

    ttft_ms: Positive
    e2e_ms: Positive


class Thresholds(_Data):
    """What a run must reach to pass."""

    failed: int = Field(default=0, ge=0)  # most requests that should have been answered and were not
    good_share: Share = 0.0  # least share of the answered requests within the goal
    layer_token_ratio: float | None = Field(default=None, ge=1)  # least dense/run rows of prefills, if asked to prune
    refusal_seconds: Positive = 2.0  # longest time until a bad request had its 4xx
    idle_seconds: Positive = 30.0  # longest time until the server held no request and was ready
    drift: Positive | None = None  # most of Result.drift: end-to-end time of the last third over the first's


class Scenario(_Data):
    """One load test."""

    summary: str  # the question it answers
    seed: int = Field(ge=0)  # of arrivals, pictures, words, and who cancels or misbehaves
    requests: int = Field(ge=1, le=MOST_REQUESTS)  # sent at most, all turns counted
    seconds: float = Field(gt=0, le=MOST_SECONDS)  # then nothing more is sent, and what runs is given up
    arrivals: Arrivals
    images: int = Field(ge=0, le=16)  # of every request, or of a conversation's first turn
    image_side: int = Field(default=336, ge=1, le=4096)  # width and height in pixels
    videos: int = Field(default=0, ge=0, le=8)  # as images; before them
    video_side: int = Field(default=224, ge=16, le=2048)  # width and height in pixels
    video_frames: int = Field(default=16, ge=1, le=600)  # four a second
    words: int = Field(ge=1, le=100_000)  # of every question
    output_tokens: int = Field(ge=1, le=100_000)  # of every answer, end-of-sequence ignored: servers do equal work
    turns: int = Field(default=1, ge=1)  # of a conversation
    cancel_share: Share = 0.0  # of the clients: these go away, each at a random time of cancel_within_seconds
    cancel_within_seconds: Positive = 1.0
    bad_share: Share = 0.0  # of the requests: these are broken or hostile
    goal: Goal
    passes: Thresholds = Thresholds()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        planned = self.arrivals.seconds(self.requests)
        if planned > self.seconds:
            raise ValueError(f"sending {self.requests} requests takes {planned:.0f} s, seconds is {self.seconds:.0f}")
        if self.turns > 1 and not isinstance(self.arrivals, Closed):
            raise ValueError('turns need arrivals of kind "closed": a turn waits for the answer before it')
        if self.requests % self.turns:
            raise ValueError(f"{self.requests} requests are no whole number of conversations of {self.turns} turns")
        if self.cancel_share + self.bad_share > 1:
            raise ValueError("cancel_share and bad_share add up to more than 1")
        return self


def load(path: Path = SHIPPED) -> dict[str, Scenario]:
    """Scenarios of a TOML file, by name. Raises ValueError: unreadable, or a mistake; names file, scenario and key."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return {name: _scenario(path, name, table) for name, table in tables.items()}


def choose(name: str, path: Path = SHIPPED) -> Scenario:
    """One scenario of a file. Raises ValueError: as :func:`load`, or no such scenario."""
    known = load(path)
    if name not in known:
        raise ValueError(f"unknown scenario {name!r}; known: {', '.join(known)}")
    return known[name]


def lengthened(scenario: Scenario, times: int) -> Scenario:
    """A scenario with ``times`` times the requests and seconds. Raises ValueError: over the bounds of any scenario."""
    longer = {"requests": times * scenario.requests, "seconds": times * scenario.seconds}
    try:
        return Scenario.model_validate(scenario.model_dump() | longer)
    except ValidationError as error:
        raise ValueError(f"{times} times as long: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None


def _scenario(path: Path, name: str, table: object) -> Scenario:
    try:
        return Scenario.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (name, *first["loc"])))
        raise ValueError(f"{path}: {where}: {first['msg']}") from None
