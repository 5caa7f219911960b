"""Two engines on the same weights, asked in turn, so that both meet the same disturbances of the machine."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, median_low
from typing import Any, Self

from rich.progress import Progress

ENVIRONMENT = {
    # The engine core runs inside the child, so that a step is timed without inter-process messages.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Workload:
    """One measured request: noise images, then text tokens; ``max_tokens`` >= 2, to see the blocks held."""

    images: int
    text: int
    max_tokens: int = 2


class EngineProcess:
    """The parent side of :mod:`vllm_hidrop.bench.engine_process`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        handle, name = tempfile.mkstemp(prefix="hidrop-bench-", suffix=".log")
        self.log = Path(name)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm_hidrop.bench.engine_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=handle,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        os.close(handle)
        try:
            self.kv_bytes_per_block = int(self._ask(settings)["kv_bytes_per_block"])
        except ValueError:
            self._end()
            raise

    def measure_warm(self, workload: Workload, seed: int) -> dict[str, Any]:
        """Run a request that is thrown away, then one that counts; see ``MeasuredEngine.measure``."""
        self._ask(vars(workload) | {"seed": seed + 1_000_000})
        return self._ask(vars(workload) | {"seed": seed})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ValueError(self._why_it_ended()) from None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(self._why_it_ended())
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _why_it_ended(self) -> str:
        lines = self.log.read_text().strip().splitlines() or ["no output"]
        return f"the engine ended: {lines[-1]} (log: {self.log})"

    def _end(self) -> None:
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        if self.process.returncode == 0:
            self.log.unlink()


@dataclass(frozen=True)
class Pair:
    """Stock vLLM and ours, running."""

    stock: EngineProcess
    ours: EngineProcess

    def measure(self, workload: Workload, num_runs: int, progress: Progress, title: str) -> "Measured":
        """Ask both in turn ``num_runs`` times, after two warm-up turns.

        In its turn an engine runs two requests and the second counts: the first brings its weights back into the
        caches that the other engine has just used, as they are in a server that is not sharing its cores.
        """
        bar = progress.add_task(title, total=num_runs + 2)
        runs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for turn in range(num_runs + 2):
            engines = (self.stock, self.ours) if turn % 2 else (self.ours, self.stock)
            replies = {id(engine): engine.measure_warm(workload, seed=turn) for engine in engines}
            runs.append((replies[id(self.stock)], replies[id(self.ours)]))
            progress.advance(bar)
        return Measured(runs[2:], self.stock.kv_bytes_per_block, self.ours.kv_bytes_per_block)


@dataclass(frozen=True)
class Measured:
    """The paired runs of one workload: (stock, ours) replies."""

    runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]
    stock_bytes_per_block: int
    our_bytes_per_block: int

    def seconds(self, engine: int) -> float:
        """Median prefill of engine 0 (stock) or 1 (ours)."""
        return median(run[engine]["step_seconds"][0] for run in self.runs)

    def decode_seconds(self, engine: int) -> float:
        """Median decode step over all runs."""
        return median(step for run in self.runs for step in run[engine]["step_seconds"][1:])

    def kv_bytes(self, engine: int) -> int:
        """Bytes of the blocks held after prefill."""
        per_block = (self.stock_bytes_per_block, self.our_bytes_per_block)[engine]
        return int(self.runs[0][engine]["kv_blocks"]) * per_block

    @property
    def kept(self) -> list[int]:
        """Vision tokens that every stage of ours ran with; the median over the runs."""
        stages = zip(*(run[1]["report"]["stages"] for run in self.runs), strict=True)
        return [int(median_low(stage["kept"] for stage in of_runs)) for of_runs in stages]

    @property
    def cached(self) -> list[int]:
        """Vision tokens in the cache of every stage of ours after prefill; the median over the runs."""
        stages = zip(*(run[1]["report"]["stages"] for run in self.runs), strict=True)
        return [int(median_low(stage["cached"] for stage in of_runs)) for of_runs in stages]

    @property
    def cut_layer(self) -> int | None:
        """First layer of ours that ran with fewer vision tokens, in the last run."""
        layer: int | None = self.runs[-1][1]["report"]["cut_layer"]
        return layer

    @property
    def selection_share(self) -> float:
        """Time on signals and selections, as a share of our prefill; the median over the runs."""
        return median(run[1]["report"]["selection_ms"] / 1000 / run[1]["step_seconds"][0] for run in self.runs)

    @property
    def kv_blocks(self) -> int:
        """Blocks ours held after prefill."""
        return int(self.runs[0][1]["kv_blocks"])

    @property
    def speedup(self) -> float:
        """Stock over ours, medians of paired runs."""
        return self.seconds(0) / self.seconds(1)


def engine_settings(model: Path, hidrop: dict[str, Any] | None, eager: bool, max_model_len: int) -> dict[str, Any]:
    """Settings of either engine; ``hidrop`` None is stock vLLM with its own model class."""
    settings: dict[str, Any] = {
        "model": str(model),
        "dtype": "bfloat16",
        "enforce_eager": eager,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_model_len,
        "block_size": 32,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
        "kv_cache_memory_bytes": 1 << 30,
        "limit_mm_per_prompt": {"image": 16},
    }
    if hidrop is not None:
        settings["hf_overrides"] = {"architectures": ["HidropLlavaForConditionalGeneration"]}
        settings["additional_config"] = {"hidrop": hidrop}
    return settings


@contextmanager
def running_pair(stock: dict[str, Any], ours: dict[str, Any], progress: Progress) -> Iterator[Pair]:
    """Start both engines, one after the other."""
    bar = progress.add_task("starting stock vLLM and ours", total=2)
    with EngineProcess(stock) as first:
        progress.advance(bar)
        with EngineProcess(ours) as second:
            progress.advance(bar)
            yield Pair(first, second)
