"""Two engines on the same weights, asked in turn, so that both meet the same disturbances of the machine."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

from rich.progress import Progress

from vllm_hidrop.bench.piped import NO_PLUGINS, PipedProcess

ENVIRONMENT = {
    # The engine core runs inside the child, so that a step is timed without inter-process messages.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
NUM_WARM_UPS = 2
STEPS_PER_TURN = 8
SHORT = 4  # images: a measurement with fewer is so short that cold caches would count


@dataclass(frozen=True)
class Workload:
    """Requests that arrive at once, each with its noise images first and its text after them."""

    images: int  # of each prompt
    text: int  # tokens of each prompt, BOS included
    count: int = 1  # number of requests
    off: bool = False  # whether ours is asked to keep every token


class EngineProcess(PipedProcess):
    """The parent side of :mod:`vllm_hidrop.bench.engine_process`; constructing it starts the process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.is_ours = "additional_config" in settings
        self.num_started = 0
        self.begin = time.perf_counter()
        self.start_seconds, self.kv_bytes_per_block = 0.0, 0
        super().__init__("vllm_hidrop.bench.engine_process", ENVIRONMENT | ({} if self.is_ours else NO_PLUGINS))
        self.send(settings)

    def wait_until_ready(self) -> None:
        """Wait until requests are taken; sets ``start_seconds``. Raises ValueError: the process ended; names a log."""
        self.kv_bytes_per_block = int(self.receive()["kv_bytes_per_block"])
        self.start_seconds = time.perf_counter() - self.begin

    def start(self, workload: Workload, picture_seed: int | None = None) -> dict[str, Any]:
        """``MeasuredEngine.start`` with new text and, unless seeded, new pictures: vLLM caches what it encoded."""
        self.num_started += 1
        seeds = {"seed": self.num_started, "picture_seed": self.num_started if picture_seed is None else picture_seed}
        return self.ask({"do": "start"} | vars(workload) | {"off": workload.off and self.is_ours} | seeds)

    def steps(self, count: int) -> list[float]:
        """Seconds of each of the next ``count`` decode steps."""
        seconds: list[float] = self.ask({"do": "steps", "count": count})["step_seconds"]
        return seconds

    def stop(self) -> None:
        """End all requests."""
        self.ask({"do": "stop"})

    def run(self, workload: Workload, picture_seed: int | None = None) -> dict[str, Any]:
        """Start, then stop; returns the reply of :meth:`start`."""
        reply = self.start(workload, picture_seed)
        self.stop()
        return reply


@dataclass(frozen=True)
class Pair:
    """Stock vLLM and ours, both running."""

    stock: EngineProcess
    ours: EngineProcess

    def in_turn(self, turn: int) -> tuple[EngineProcess, EngineProcess]:
        """Both engines; stock first in odd turns, ours in even ones."""
        return (self.stock, self.ours) if turn % 2 else (self.ours, self.stock)

    def measure(self, workload: Workload, num_runs: int, progress: Progress, title: str) -> "Measured":
        """Prefill in both in turn ``num_runs`` times, after two warm-up turns.

        A short prefill runs twice in a turn and the second counts: the first brings the engine's weights back into the
        caches that the other engine has just used, as they are in a server that is not sharing its cores.
        """
        runs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for turn in progress.track(range(num_runs + NUM_WARM_UPS), description=title):
            replies = {}
            for engine in self.in_turn(turn):
                if workload.count * workload.images < SHORT:
                    engine.run(workload)
                replies[engine.is_ours] = engine.run(workload)
            runs.append((replies[False], replies[True]))
        return Measured(runs[NUM_WARM_UPS:])

    def decode_seconds(self, workload: Workload, num_runs: int, progress: Progress, title: str) -> tuple[float, float]:
        """Median seconds of a decode step of (stock, ours), all requests in it; a turn's first step warms up only."""
        seconds: dict[bool, list[float]] = {False: [], True: []}
        bar = progress.add_task(title, total=num_runs + NUM_WARM_UPS + 2)
        for engine in (self.stock, self.ours):
            engine.start(workload)
            progress.advance(bar)
        for turn in range(num_runs + NUM_WARM_UPS):
            for engine in self.in_turn(turn):
                found = engine.steps(STEPS_PER_TURN)[1:]
                seconds[engine.is_ours] += found if turn >= NUM_WARM_UPS else []
            progress.advance(bar)
        for engine in (self.stock, self.ours):
            engine.stop()
        return median(seconds[False]), median(seconds[True])


@dataclass(frozen=True)
class Measured:
    """The replies to the paired prefills of one workload, (stock, ours) per run."""

    runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]

    def seconds(self, engine: int) -> float:
        """Median time until every request had its first token; engine 0 is stock, 1 ours."""
        return median(sum(run[engine]["step_seconds"]) for run in self.runs)

    def num_steps(self, engine: int) -> int:
        """Median number of steps until every request had its first token."""
        return int(median_low(len(run[engine]["step_seconds"]) for run in self.runs))

    @property
    def kept(self) -> list[int]:
        """Vision tokens that every stage of ours ran with; medians over the runs."""
        return self._of_stages("kept")

    @property
    def cached(self) -> list[int]:
        """Vision tokens in every stage's cache of ours after prefill; medians over the runs."""
        return self._of_stages("cached")

    def _of_stages(self, what: str) -> list[int]:
        stages = zip(*(run[1]["report"]["stages"] for run in self.runs), strict=True)
        return [int(median_low(stage[what] for stage in of_runs)) for of_runs in stages]

    @property
    def cut_layer(self) -> int | None:
        """First layer of ours that ran with fewer vision tokens, in the last run."""
        layer: int | None = self.runs[-1][1]["report"]["cut_layer"]
        return layer

    @property
    def selection_share(self) -> float:
        """Time on signals and selections as a share of our prefill; median over the runs."""
        return median(run[1]["report"]["selection_ms"] / 1000 / run[1]["step_seconds"][0] for run in self.runs)

    @property
    def kv_blocks(self) -> int:
        """Blocks that ours held after prefill, in the first run."""
        return int(self.runs[0][1]["kv_blocks"])


@contextmanager
def running_pair(stock: dict[str, Any], ours: dict[str, Any], progress: Progress) -> Iterator[Pair]:
    """Start both engines at the same time."""
    bar = progress.add_task("starting stock vLLM and ours", total=2)
    with EngineProcess(stock) as first, EngineProcess(ours) as second:
        for engine in (first, second):
            engine.wait_until_ready()
            progress.advance(bar)
        yield Pair(first, second)
