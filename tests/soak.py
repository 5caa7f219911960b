"""Soak: thousands of mixed requests against servers whose pools and caches are too small for them.

``python -m tests.soak`` (``make soak``) serves the embedded models with few KV blocks and little room for images, one
with its own method and one whose stages several methods share, asks every distinct request once by itself, then sends a
seeded mixture of them side by side: pruned with several keeps, ``off``, text, every method, more images than any cache
holds, n > 1, streams, stop strings, grammars, clients that leave, requests that must be refused, hostile bodies. It
fails unless every answer is the one given in isolation, requests were preempted, ``/ready`` and the pool are clean
afterwards and memory stayed.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.server.harness import data_url, image_url, user
from tests.server.http import hostile
from vllm_hidrop.cli.local_server import local_server

LIMITS = ("--max-model-len", "1536", "--max-num-batched-tokens", "1536", "--mm-processor-cache-gb", "0.004")
"""The cache of processed images holds nine pictures."""
SHARED = json.dumps({"method": "mustdrop", "options": {"cut_cache": False}})
SERVERS = {
    "its own method": (*LIMITS, "--num-gpu-blocks-override", "600"),
    "methods that share its stages": (*LIMITS, "--num-gpu-blocks-override", "300", "--hidrop-config", SHARED),
}
NUM_PICTURES = 24
NUM_HOSTILE = 12
HOSTILE_SHARE = 0.05
HOSTILE_BYTES = 1 << 20
"""Larger ones are for ``test_hostile_bodies``: they would keep the client busy, not the server."""
MEMORY_TOLERANCE = 0.15
"""The server may hold so much more at the end than after a quarter of the requests.

Measured: 10 % from request 500 to 2,000, ever slower. Stock vLLM grows alike: 1,500 mixed requests in one process
took it from 842 to 1,150 MiB, ours from 908 to 1,208.
"""
SETTLING_REQUESTS = 500
"""Memory is not judged where the first quarter is shorter: the worker grows fastest at the start."""
HOW = ("whole", "whole", "stream", "stream", "stream", "leave", "give up")
"""How a request is sent, drawn evenly: read whole or as a stream, left after the first token, or after a moment."""

Answer = dict[str, Any]


@dataclass
class Result:
    """What a soak came to; ``failures`` is empty when all is well."""

    requests: int
    seconds: float
    outcomes: dict[str, dict[str, int]]
    """Kind of request -> outcome -> how many."""
    preemptions: int
    integrity: dict[str, Any]
    memory_mib: list[dict[str, float]]
    """Of the server's processes by name, at each quarter of the requests."""
    failures: list[str] = field(default_factory=list)


def distinct_requests(
    schedule: list[dict[str, Any]], methods: list[str], keeping: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Bodies of chat requests by name; those that begin with "bad" must be refused.

    Args:
        schedule: the server's stages.
        methods: others than its own.
        keeping: wishes under which it takes keeps.
    """
    rest = len(schedule) - 2
    long: dict[str, Any] = {"ignore_eos": True, "max_tokens": 120}
    sampled: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "seed": 7, "ignore_eos": True, "max_tokens": 40}
    question, text = "what colour is the circle ?", "how many objects are there ?"

    def ask(images: list[int], words: str = question, **more: Any) -> dict[str, Any]:
        return {"messages": [user([image_url(seed) for seed in images], words)], "temperature": 0, **more}

    def wish(**options: Any) -> dict[str, Any]:
        return {"vllm_xargs": {f"hidrop{'_' * bool(key)}{key}": value for key, value in options.items()}}

    found = {
        "pruned": ask([0], **long),
        "pruned, short": ask([1], max_tokens=3),
        "pruned, two images": ask([1, 2], **long),
        "pruned, other keeps": ask([0], **long) | wish(keep=["all", 0.5, *[9] * rest], **keeping),
        "pruned, few kept": ask([3], **long) | wish(keep=[0, "all", *[1] * rest], **keeping),
        "pruned, sampled": ask([3], **sampled),
        "pruned, n": ask([2], **sampled | {"n": 3}),
        "pruned, stop": ask([4], **long, stop=["red", "circle", "is", "the"]),
        "pruned, penalty": ask([4], **long, repetition_penalty=1.3),
        "pruned, choice": ask([0], structured_outputs={"choice": ["red", "blue", "green"]}),
        "off": ask([0], **long, vllm_xargs={"hidrop": "off"}),
        "off, two images": ask([1, 2], **long, vllm_xargs={"hidrop": "off"}),
        "off, n": ask([3], **sampled | {"n": 2}, vllm_xargs={"hidrop": "off"}),
        "text": ask([], text, **long),
        "text, long": ask([], text * 100, **long),
        "text, sampled": ask([], text * 60, **sampled),
        "bad option": ask([0], vllm_xargs={"hidrop": "maybe"}),
        "bad keeps": ask([0], vllm_xargs={"hidrop_keep": ["all"]}),
        "bad prompt log-probabilities": ask([0], prompt_logprobs=1),
        "bad length": ask([0], "red " * 1600),
    }
    for seed in range(10, 10 + NUM_PICTURES):
        found[f"picture {seed}"] = ask([seed], max_tokens=8) | wish(**({"": "off"} if seed % 3 == 0 else {}))
    found["bad image"] = {**ask([]), "messages": [user([data_url(b"no image")], question)]}
    for number, method in enumerate(methods):
        found[f"method {method}"] = ask([0], **long) | wish(method=method)
        found[f"method {method}, two pictures"] = ask([1, 10 + number], max_tokens=8) | wish(method=method)
    return found


def _keeping(described: dict[str, Any]) -> dict[str, Any]:
    """A method that decides the counts itself takes no keeps: then one of the others that does."""
    return {"method": "fastv"} if described["keeps_are_bounds"] else {}


def hostile_requests(model: str, rng: random.Random) -> dict[str, tuple[str, bytes]]:
    """Path and body of a few that must be refused, or answered, soon; drawn from all of ``http.hostile``."""
    every = [(path, *shape) for path, base in hostile.routes(model).items() for shape in hostile.shapes(path, base)]
    found: dict[str, tuple[str, bytes]] = {}
    while len(found) < NUM_HOSTILE:
        path, name, make = rng.choice(every)
        if len(body := make()) <= HOSTILE_BYTES:
            found[f"hostile: {path}, {name}"] = path, body
    return found


@dataclass
class Soak:
    """One run against a server that is up.

    Attributes:
        http: a client of the server.
        rng: draws the mixture.
        memory: resident MiB of the server's processes now, by name.
        clients: how many send side by side.
    """

    http: httpx.AsyncClient
    rng: random.Random
    memory: Callable[[], dict[str, float]]
    clients: int = 16
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    memory_mib: list[dict[str, float]] = field(default_factory=list)

    async def run(self, num_requests: int, seconds: float, advance: Callable[[], object]) -> Result:
        """Send the mixture; stop sending after so many seconds."""
        described = (await self.http.get("/hidrop")).json()
        model = (await self.http.get("/v1/models")).json()["data"][0]["id"]
        methods = [name for name in described["request_methods"] if name != described["method"]]
        kinds = {
            name: {"model": model, **body}
            for name, body in distinct_requests(described["stages"], methods, _keeping(described)).items()
        }
        alone = {name: await self._send(body, "whole") for name, body in kinds.items()}
        for name, answer in alone.items():
            if answer is None or (answer["status"] == 200) == name.startswith("bad"):
                self.failures.append(f"{name}: in isolation {answer}")
        bodies = hostile_requests(model, self.rng)
        refused = {name: await self._refuse(*body) for name, body in bodies.items()}
        self.failures += [f"{name}: in isolation {status}" for name, status in refused.items() if status >= 500]
        drawn = [(self._draw(kinds, bodies), self.rng.choice(HOW)) for _ in range(num_requests)]
        queue = list(enumerate(drawn))[::-1]
        quarters = [num_requests * quarter // 4 for quarter in (1, 2, 3)]
        start = time.monotonic()

        async def client() -> None:
            while queue and time.monotonic() - start < seconds:
                number, (name, how) = queue.pop()
                if number in quarters:
                    self.memory_mib.append(self.memory())
                if name in bodies:
                    outcome = "equal" if await self._refuse(*bodies[name]) == refused[name] else "wrong"
                else:
                    outcome = await self._check(kinds[name], how, alone[name])
                self.outcomes.setdefault(name, Counter())[outcome] += 1
                if outcome == "wrong":
                    self.failures.append(f"{name} ({how}), request {number}: not the answer in isolation")
                advance()

        await asyncio.gather(*[client() for _ in range(self.clients)])
        took = time.monotonic() - start
        if queue:
            self.failures.append(f"{len(queue)} requests were not sent in {seconds:.0f} s")
        return await self._finish(num_requests - len(queue), took)

    def _draw(self, kinds: Collection[str], bodies: Collection[str]) -> str:
        return self.rng.choice(list(bodies if self.rng.random() < HOSTILE_SHARE else kinds))

    async def _refuse(self, path: str, body: bytes) -> int:
        headers = {"Content-Type": "application/json"}
        return (await self.http.post(path, content=body, headers=headers)).status_code

    async def _check(self, body: dict[str, Any], how: str, expected: Answer | None) -> str:
        answer = await self._send(body, how)
        if answer is None:
            return "left"
        return "equal" if answer == expected else "wrong"

    async def _send(self, body: dict[str, Any], how: str) -> Answer | None:
        """The answer without times; None if the client left."""
        url = "/v1/chat/completions"
        if how in ("whole", "give up"):
            try:
                timeout = 300 if how == "whole" else self.rng.uniform(0.01, 1.0)
                response = await self.http.post(url, json=body, timeout=timeout)
            except httpx.TimeoutException:
                if how == "whole":
                    raise
                return None
            return _whole(response.status_code, response.json())
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        async with self.http.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                return _whole(response.status_code, json.loads(await response.aread()))
            chunks = []
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line.removeprefix("data: ")))
                    if how == "leave" and len(chunks) > 1:
                        return None
            return _streamed(chunks)

    async def _finish(self, num_requests: int, took: float) -> Result:
        """Wait until the engine idles and look at what is left."""
        before = (await self.http.get("/ready")).json()["integrity"].get("checks", 0)
        ready: dict[str, Any] = {}
        for _ in range(200):
            await self._send({"messages": [user([], "what is this ?")], "max_tokens": 1}, "whole")
            await asyncio.sleep(0.1)
            ready = (await self.http.get("/ready")).json()
            if ready["integrity"].get("checks", 0) > before:
                break
        else:
            self.failures.append("the engine did not become idle")
        if not ready["ready"]:
            self.failures.append(f"not ready: {ready}")
        metrics = await self._metrics()
        if metrics["vllm:kv_cache_usage_perc"] or metrics["vllm:num_requests_running"]:
            self.failures.append("requests or blocks are left over")
        if not metrics["vllm:num_preemptions_total"]:
            self.failures.append("nothing was preempted: the pool was large enough")
        self.memory_mib.append(self.memory())
        first, last = (sum(self.memory_mib[i].values()) for i in (0, -1))
        if num_requests >= 4 * SETTLING_REQUESTS and last > first * (1 + MEMORY_TOLERANCE):
            self.failures.append(f"memory grew from {first:.0f} to {last:.0f} MiB")
        return Result(
            num_requests,
            took,
            {name: dict(counts) for name, counts in sorted(self.outcomes.items())},
            int(metrics["vllm:num_preemptions_total"]),
            ready["integrity"],
            self.memory_mib,
            self.failures,
        )

    async def _metrics(self) -> dict[str, float]:
        text = (await self.http.get("/metrics")).text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
        return found


def _whole(status: int, data: dict[str, Any]) -> Answer:
    if status != 200:
        return {"status": status}  # a stream may be refused in other words
    choices = [[c["message"]["content"], c["finish_reason"], c["stop_reason"]] for c in data["choices"]]
    return {"status": status, "choices": choices, **_counts(data["usage"], data["hidrop"])}


def _streamed(chunks: list[dict[str, Any]]) -> Answer:
    errors = [chunk["error"] for chunk in chunks if "error" in chunk]
    if errors:
        return {"status": errors[0]["code"], "says": errors[0]["message"]}
    choices: dict[int, list[Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], ["", None, None])
            choice[0] += part["delta"].get("content") or ""
            if part["finish_reason"]:
                choice[1:] = [part["finish_reason"], part.get("stop_reason")]
    in_order = [choices[index] for index in sorted(choices)]
    return {"status": 200, "choices": in_order, **_counts(chunks[-1]["usage"], chunks[-1]["hidrop"])}


def _counts(usage: dict[str, Any], report: dict[str, Any]) -> Answer:
    kept = [stage["kept"] for stage in report["stages"]]
    tokens = [usage["prompt_tokens"], usage["completion_tokens"]]
    return {"tokens": tokens, "mode": report["mode"], "method": report["method"], "kept": kept}


def memory_of_children(but: set[psutil.Process]) -> dict[str, float]:
    """Resident MiB of every process below this one, by name, without some and what is below those."""
    found: dict[str, float] = {}
    for process in set(psutil.Process().children(recursive=True)) - but:
        found[process.name()] = found.get(process.name(), 0) + process.memory_info().rss / 2**20
    return found


def soak(server: str, num_requests: int, seconds: float, seed: int = 0, console: Console | None = None) -> Result:
    """Start one of :data:`SERVERS`, soak it, end it."""
    console = console or Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        others = set(psutil.Process().children(recursive=True))
        task = progress.add_task("starting the server", total=None)
        with local_server(SERVERS[server], on_wait=lambda: None) as url:
            progress.update(task, description="soaking", total=num_requests)

            async def run() -> Result:
                # No connection is used twice: the server may be closing an idle one at that moment.
                limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
                async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
                    run = Soak(http, random.Random(seed), lambda: memory_of_children(others))
                    return await run.run(num_requests, seconds, lambda: progress.advance(task))

            return asyncio.run(run())


def show(result: Result, console: Console) -> None:
    """The summary."""
    table = Table("request", "equal", "left", "wrong", title=f"{result.requests} requests in {result.seconds:.0f} s")
    for name, counts in result.outcomes.items():
        table.add_row(name, *[str(counts.get(outcome, 0)) for outcome in ("equal", "left", "wrong")])
    console.print(table)
    console.print(f"preemptions {result.preemptions}, integrity {result.integrity}")
    console.print("server memory in MiB, by quarter:")
    for name in sorted({name for memory in result.memory_mib for name in memory}):
        console.print(f"  {name}: " + ", ".join(f"{memory.get(name, 0):.0f}" for memory in result.memory_mib))
    for failure in result.failures[:20]:
        console.print(f"FAILED: {failure}", markup=False)


def main() -> int:
    """Command line; exit code 1 when anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=6000, help="of all servers together")
    parser.add_argument("--seconds", type=float, default=1800, help="give up after so long (default: 1800)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    results = {name: soak(name, args.requests // len(SERVERS), args.seconds, args.seed) for name in SERVERS}
    for name, result in results.items():
        Console().rule(name)
        show(result, Console())
    if args.json:
        args.json.write_text(json.dumps({name: asdict(each) for name, each in results.items()}, indent=2) + "\n")
    return int(any(result.failures for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
