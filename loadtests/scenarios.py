"""What a load test is, read from TOML: traffic, bounds, a goal for each request, what the whole must reach to pass."""

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
        """How long sending alone takes: a server decides, so nothing is known."""
        return 0.0


class Poisson(_Data):
    """Independent clients: exponential gaps."""

    kind: Literal["poisson"]
    requests_per_second: Positive

    def seconds(self, requests: int) -> float:
        """How long sending alone takes."""
        return requests / self.requests_per_second


class Burst(_Data):
    """Groups at once, at fixed times."""

    kind: Literal["burst"]
    at_once: int = Field(ge=1)
    every_seconds: Positive

    def seconds(self, requests: int) -> float:
        """How long sending alone takes."""
        return (requests - 1) // self.at_once * self.every_seconds


class Ramp(_Data):
    """A rate that changes linearly from the first request to the last; whole numbers, as vLLM's client takes them."""

    kind: Literal["ramp"]
    from_requests_per_second: int = Field(ge=1)
    to_requests_per_second: int = Field(ge=1)

    def seconds(self, requests: int) -> float:
        """How long sending alone takes, at most."""
        return requests / min(self.from_requests_per_second, self.to_requests_per_second)


Arrivals = Annotated[Closed | Poisson | Burst | Ramp, Field(discriminator="kind")]


class Goal(_Data):
    """What makes one answer a good one: goodput counts these."""

    ttft_ms: Positive
    e2e_ms: Positive


class Thresholds(_Data):
    """What a run must reach to pass.

    Attributes:
        failed: most requests that should have been answered and were not.
        good_share: least share of the answered requests within the goal.
        layer_token_ratio: least ratio of a dense prefill's rows to those run, where the server was asked to prune.
        refusal_seconds: longest time until a bad request had its 4xx.
        idle_seconds: longest time until the server held no request any more and was ready.
        drift: most that the median end-to-end time of the last third of the answers may be of the first third's.
    """

    failed: int = Field(default=0, ge=0)
    good_share: Share = 0.0
    layer_token_ratio: float | None = Field(default=None, ge=1)
    refusal_seconds: Positive = 2.0
    idle_seconds: Positive = 30.0
    drift: Positive | None = None


class Scenario(_Data):
    """One load test.

    Attributes:
        summary: the question it answers.
        seed: of arrivals, pictures, words, and who cancels or misbehaves.
        requests: sent at most, all turns counted.
        seconds: after this nothing is sent, and what still runs is given up.
        arrivals: when requests are sent.
        images: in every request, or in the first turn of every conversation.
        image_side: width and height in pixels.
        words: of every question.
        output_tokens: of every answer, end-of-sequence ignored, so that every server does the same work.
        turns: of a conversation.
        cancel_share: share of the clients that go away, each at a random time of ``cancel_within_seconds``.
        cancel_within_seconds: see above.
        bad_share: share of the requests that are broken or hostile.
        goal: what makes one answer a good one.
        passes: what the whole must reach.
    """

    summary: str
    seed: int = Field(ge=0)
    requests: int = Field(ge=1, le=MOST_REQUESTS)
    seconds: float = Field(gt=0, le=MOST_SECONDS)
    arrivals: Arrivals
    images: int = Field(ge=0, le=16)
    image_side: int = Field(default=336, ge=1, le=4096)
    words: int = Field(ge=1, le=100_000)
    output_tokens: int = Field(ge=1, le=100_000)
    turns: int = Field(default=1, ge=1)
    cancel_share: Share = 0.0
    cancel_within_seconds: Positive = 1.0
    bad_share: Share = 0.0
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
    """Read a file of scenarios, by name.

    Raises:
        ValueError: not readable, not TOML, or a scenario with a mistake; names the file, the scenario and the key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return {name: _scenario(path, name, table) for name, table in tables.items()}


def choose(name: str, path: Path = SHIPPED) -> Scenario:
    """One scenario of a file.

    Raises:
        ValueError: as :func:`load`, or no such scenario.
    """
    known = load(path)
    if name not in known:
        raise ValueError(f"unknown scenario {name!r}; known: {', '.join(known)}")
    return known[name]


def lengthened(scenario: Scenario, times: int) -> Scenario:
    """The same for so many times as many requests and seconds.

    Raises:
        ValueError: over the bounds of any scenario.
    """
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
