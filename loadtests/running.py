"""Run a scenario against one server or two, in turn, and collect the results."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import httpx

from hidrop_loadtests.addresses import is_loopback, parse_address
from hidrop_loadtests.metrics import LATENCIES, Growth, idle_after, read
from hidrop_loadtests.scenarios import Closed, Goal, Scenario
from hidrop_loadtests.sending import Endpoint, Outcome, Sent, send
from hidrop_loadtests.traffic import Ask, first_turns, next_turns

OFF = {"vllm_xargs": {"hidrop": "off"}}
PERCENTILES = (50, 90, 95, 99)
WARM_UP_SEED = 1_000_000
WARM_UP_REQUESTS = 4


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a server, or one way of asking a server."""

    name: str
    endpoint: Endpoint
    prunes: bool


@dataclass(frozen=True)
class Result:
    """What came of a scenario at one arm."""

    arm: Arm
    outcomes: tuple[Outcome, ...]  # one per request
    seconds: float  # from the first request to the last answer, summed over rounds
    growth: Growth  # what the server counted meanwhile
    idle_seconds: float | None  # until the server held no request and was ready; None: longer than the scenario allows

    def count(self, kind: str, bad: bool | None = None) -> int:
        """Number of outcomes of a kind; ``bad`` True: of broken requests only, False: of good ones only."""
        return sum(o.kind == kind and bad in (None, o.bad is not None) for o in self.outcomes)

    def within(self, goal: Goal) -> int:
        """Number of good requests whose first token and end came within the goal."""
        return sum(
            o.kind == "answered" and o.bad is None and 1000 * o.ttft <= goal.ttft_ms and 1000 * o.latency <= goal.e2e_ms
            for o in self.outcomes
        )

    def drift(self) -> float | None:
        """Median end-to-end time, last third of the answers over the first third; None with fewer than 3 answers."""
        answered = sorted((o.sent_at, o.latency) for o in self.outcomes if o.kind == "answered" and o.bad is None)
        third = len(answered) // 3
        if not third:
            return None
        return median(latency for _, latency in answered[-third:]) / median(latency for _, latency in answered[:third])

    def times_ms(self) -> dict[str, list[float]]:
        """Every time of the answered requests, in ms by the client's clock."""
        answered = [outcome for outcome in self.outcomes if outcome.kind == "answered"]
        return {
            "ttft": [1000 * outcome.ttft for outcome in answered],
            "itl": [1000 * itl for outcome in answered for itl in outcome.itls],
            "e2e": [1000 * outcome.latency for outcome in answered],
        }

    def client_ms(self) -> dict[str, dict[str, float]]:
        """Mean and percentiles of :meth:`times_ms`, of the kinds of time that were measured."""
        import numpy as np

        return {
            name: {"mean": float(np.mean(times))} | {f"p{p}": float(np.percentile(times, p)) for p in PERCENTILES}
            for name, times in self.times_ms().items()
            if times
        }

    def server_ms(self) -> dict[str, dict[str, float]]:
        """Mean and percentiles in ms by the server's histograms, which are coarser."""
        found = {name: self.growth.latency_ms(metric) for name, metric in LATENCIES.items()}
        return {name: values for name, values in found.items() if values}


def check_address(url: str, allow_remote: bool) -> str:
    """An address in :func:`parse_address`'s form. Raises ValueError: it is none, or another machine's without leave."""
    address = parse_address(url)
    if not allow_remote and not is_loopback(address):
        raise ValueError(f"{url} is another machine: a load test of it needs --allow-remote, and its owner's consent")
    return address


@dataclass(frozen=True)
class Keys:
    """API keys of a server: its clients' key, and the key of ``/metrics`` if that is another."""

    api: str | None = None
    metrics: str | None = None


def connect(url: str, keys: Keys = Keys(), body: dict[str, Any] | None = None) -> Endpoint:
    """An endpoint for the first model of a server. Raises ValueError: no server answers, or it wants another key."""
    unnamed = Endpoint(url, "", body or {}, keys.api, keys.metrics)
    try:
        answer = httpx.get(f"{url}/v1/models", headers=unnamed.headers, timeout=30)
        answer.raise_for_status()
        model = str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{url}/v1/models: {error}") from None
    return replace(unnamed, model=model)


def run(
    scenario: Scenario,
    arms: Sequence[Arm],
    pairs: int = 1,  # runs of the scenario on every arm, with other pictures each time
    on_start: Callable[[str], None] = lambda _: None,  # told the name of an arm before it is asked
    quiet: bool = False,  # show no progress bar
) -> list[Result]:
    """Warm every arm up, then run the scenario on each in alternating order. Raises ValueError: a server is gone."""
    for index, arm in enumerate(arms):
        _warm_up(scenario, arm, WARM_UP_SEED + index)
    found: dict[int, list[Result]] = {index: [] for index in range(len(arms))}
    for pair in range(pairs):
        for index in found if pair % 2 == 0 else reversed(found):
            on_start(arms[index].name)
            found[index].append(_run_arm(scenario, arms[index], pair * len(arms) + index, quiet))
    return [_joined(results) for results in found.values()]


def _warm_up(scenario: Scenario, arm: Arm, picture_seed: int) -> None:
    changed: dict[str, Any] = {"requests": WARM_UP_REQUESTS, "turns": 1, "bad_share": 0.0, "cancel_share": 0.0}
    changed["arrivals"] = Closed(kind="closed", at_once=2)
    warm = scenario.model_copy(update=changed)
    send(warm, first_turns(warm, picture_seed), arm.endpoint, time.monotonic() + scenario.seconds, True)


def _joined(results: Sequence[Result]) -> Result:
    """All runs of an arm as one result; its idle time is the longest."""
    idle = [result.idle_seconds for result in results]
    return Result(
        results[0].arm,
        tuple(outcome for result in results for outcome in result.outcomes),
        sum(result.seconds for result in results),
        Growth.joined([result.growth for result in results]),
        None if None in idle else max(seconds for seconds in idle if seconds is not None),
    )


def _run_arm(scenario: Scenario, arm: Arm, picture_seed: int, quiet: bool) -> Result:
    idle_after(arm.endpoint, scenario.passes.idle_seconds)
    before = read(arm.endpoint)
    rounds = _rounds(scenario, arm, picture_seed, quiet)
    idle = idle_after(arm.endpoint, scenario.passes.idle_seconds)
    growth = Growth.between(before, read(arm.endpoint))
    outcomes = tuple(outcome for sent in rounds for outcome in sent.outcomes)
    return Result(arm, outcomes, sum(sent.seconds for sent in rounds), growth, idle)


def _rounds(scenario: Scenario, arm: Arm, picture_seed: int, quiet: bool) -> list[Sent]:
    """One round of requests per turn: a turn's prompts carry the answers of the turns before."""
    deadline = time.monotonic() + scenario.seconds
    asks: list[Ask] = first_turns(scenario, picture_seed)
    rounds = [send(scenario, asks, arm.endpoint, deadline, quiet)]
    for turn in range(1, scenario.turns):
        asks = next_turns(scenario, asks, [outcome.text for outcome in rounds[-1].outcomes], turn)
        rounds.append(send(scenario, asks, arm.endpoint, deadline, quiet))
    return rounds
