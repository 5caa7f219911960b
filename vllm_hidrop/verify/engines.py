"""Engines to be asked: which settings each starts with, and running them in child processes beside each other."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_hidrop.bench.paired import ENVIRONMENT
from vllm_hidrop.bench.piped import NO_PLUGINS, PipedProcess
from vllm_hidrop.models.families import hidrop_architecture
from vllm_hidrop.verify.cases import POOL_BYTES, Model, Question
from vllm_hidrop.verify.prompts import Prompt

BLOCK_SIZE = 32
STEP_TOKENS = 8192  # all questions of a batch are prefilled in one step
EXACT_FLOAT32 = {"TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0"}
"""On a GPU, float32 kernels round to 10 bits (TF32) unless told not to: Triton's own, then cuBLAS and cuDNN."""
PARALLEL = 4  # child processes at once with a GPU; each holds one tiny engine
AS_OURS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}  # compiled, stock vLLM would round otherwise
TOO_LATE = "time"  # the failure of a job that did not start before the deadline
TINY_POOL_BYTES = 1 << 28
MEMORY_SHARE = {True: 0.05, False: 0.8}  # of a GPU that must be free when an engine starts; True: for a tiny model


@dataclass(frozen=True)
class Answer:
    """What came back for a question; ``prompt`` is what vLLM made of it.

    ``logprobs[n]`` are those of the most likely tokens at generated token n; ``first_step`` is the engine step that
    gave the first token; ``report`` is the ``hidrop`` object of the response, None from stock vLLM.
    """

    token_ids: list[int]
    logprobs: Sequence[dict[int, float]]
    first_step: int
    report: dict[str, Any] | None
    prompt: Prompt


@dataclass(frozen=True)
class Job:
    """One engine: ``choice`` None is stock vLLM; each batch of questions is asked at once, by name."""

    model: Model
    choice: Mapping[str, Any] | None
    dtype: str
    eager: bool
    batches: Mapping[str, Sequence[Question]]

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of ``vllm.LLM``."""
        tiny = self.model.is_tiny
        stock = {
            "model": self.model.path,
            "dtype": self.dtype,
            "enforce_eager": self.eager,
            "max_model_len": self.model.max_len,
            "max_num_batched_tokens": STEP_TOKENS,
            "max_num_seqs": 32,
            "block_size": BLOCK_SIZE,
            "enable_prefix_caching": False,
            "limit_mm_per_prompt": {"image": 3, "video": 0},
            "skip_mm_profiling": True,  # with images of the largest size, which nobody asks about
            "distributed_executor_backend": "uni",
            "kv_cache_memory_bytes": TINY_POOL_BYTES if tiny else POOL_BYTES,
            "gpu_memory_utilization": MEMORY_SHARE[tiny],
            "seed": 0,
        }
        if self.choice is None:
            return stock if self.eager else stock | {"compilation_config": AS_OURS}
        ours = {"architectures": [hidrop_architecture(self.model.architecture)]}
        return stock | {"hf_overrides": ours, "additional_config": {"hidrop": dict(self.choice)}}


@dataclass(frozen=True)
class Ran:
    """What a job gave; ``failure`` says why nothing or not all is there, ``leaks`` what the engine had not freed."""

    facts: dict[str, Any]
    answers: dict[str, list[Answer]]
    leaks: list[str]
    failure: str | None = None


class EngineChild(PipedProcess):
    """The parent side of :mod:`vllm_hidrop.verify.engine_process`."""

    module = "vllm_hidrop.verify.engine_process"

    def __init__(self, ours: bool, model: str) -> None:
        offline = {} if Path(model).is_dir() else {"HF_HUB_OFFLINE": "0"}
        environment = ENVIRONMENT | EXACT_FLOAT32 | offline | ({} if ours else NO_PLUGINS)
        super().__init__(self.module, environment)

    def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        """The reply to a command. Raises ValueError: it failed, or the process ended."""
        reply = self.ask({"do": name, **arguments})
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply

    def run(self, job: Job) -> Ran:
        """Start the job's engine, ask it everything, stop it; a failure ends the job, not the caller."""
        facts: dict[str, Any] = {}
        answers: dict[str, list[Answer]] = {}
        try:
            facts = self.command("open", settings=job.settings)
            for name, questions in job.batches.items():
                reply = self.command("ask", questions=[asdict(question) for question in questions])
                answers[name] = [_answer(found) for found in reply["answers"]]
            return Ran(facts, answers, self.command("close")["leaks"])
        except ValueError as error:
            return Ran(facts, answers, [], str(error))


def _answer(found: dict[str, Any]) -> Answer:
    logprobs = [{int(token): value for token, value in of_token.items()} for of_token in found["logprobs"]]
    made = found["prompt"]
    spans, sizes = ([(a, b) for a, b in made[name]] for name in ("spans", "sizes"))
    prompt = Prompt(made["token_ids"], spans, sizes)
    return Answer(found["token_ids"], logprobs, found["first_step"], found["report"], prompt)


def run_lane(jobs: Sequence[tuple[str, Job]], done: Callable[[], None], deadline: float) -> dict[str, Ran]:
    """Run named jobs of one kind one after another, in one process as long as none fails; none starts too late."""
    found: dict[str, Ran] = {}
    child: EngineChild | None = None
    for name, job in jobs:
        if time.monotonic() > deadline:
            found[name] = Ran({}, {}, [], TOO_LATE)
            continue
        child = child or EngineChild(job.choice is not None, job.model.path)
        found[name] = child.run(job)
        if found[name].failure:
            child.process.kill()  # a device error stays with its process
            child.__exit__(None)
            child = None
        done()
    if child:
        child.__exit__(None)
    return found


def run_jobs(jobs: Mapping[str, Job], done: Callable[[], None], with_gpu: bool, deadline: float) -> dict[str, Ran]:
    """Run all jobs, stock vLLM's and ours in processes of their own; tiny ones at the same time where there is room."""
    lanes: dict[tuple[Any, ...], list[tuple[str, Job]]] = {}
    for name, job in jobs.items():
        kind = (job.choice is None, *((job.dtype, job.eager) if with_gpu else ()))
        lanes.setdefault(kind, []).append((name, job))
    tiny = all(job.model.is_tiny for job in jobs.values())
    workers = 1 if not tiny else PARALLEL if with_gpu else max(1, (os.cpu_count() or 1) // 2)
    found: dict[str, Ran] = {}
    with ThreadPoolExecutor(workers) as pool:
        for of_lane in pool.map(lambda lane: run_lane(lane, done, deadline), lanes.values()):
            found |= of_lane
    return found
