"""Real vLLM engines in this process, one at a time, with their scheduler and runner at hand."""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.triton_utils import dispatcher

from vllm_hidrop.methods.scoring import Signals, select_top
from vllm_hidrop.models.families import hidrop_architecture
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.verify.tiny_models import IMAGE_SIZE, IMAGE_TOKEN

TOWER_SIZE = (IMAGE_SIZE, IMAGE_SIZE)
ARCHITECTURE = "HidropLlavaForConditionalGeneration"


@dataclass(frozen=True)
class Ask:
    """One request: tokens with one image token per image, seeds of the images, its own options.

    ``sizes``: width and height of each image, where they are not the towers' own.
    """

    tokens: tuple[int, ...]
    images: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 6
    sizes: tuple[tuple[int, int], ...] = ()

    def pictures(self) -> list[Image.Image]:
        sizes = self.sizes or (TOWER_SIZE,) * len(self.images)
        return [picture(seed, size) for seed, size in zip(self.images, sizes, strict=True)]


@dataclass
class Answer:
    """What came back: tokens, raw logits [generated, vocabulary], the report, what each cut kept, and vLLM's count."""

    token_ids: list[int]
    logits: torch.Tensor
    report: dict[str, Any]
    finish_reason: str
    cached_tokens: int = 0


def picture(seed: int, size: tuple[int, int] = TOWER_SIZE) -> Image.Image:
    """A noise image; of the towers' own size no resampling blurs the comparison."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def prompt(rng: np.random.Generator, layout: str) -> tuple[int, ...]:
    """Random tokens; in ``layout`` an ``i`` is an image, a digit that many text tokens."""
    tokens: list[int] = [1]
    for part in layout:
        tokens += [IMAGE_TOKEN] if part == "i" else rng.integers(4, 120, int(part)).tolist()
    return tuple(tokens)


class Engine:
    """An in-process engine."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.num_free_at_start = self.pool.get_num_free_blocks()

    @property
    def runner(self) -> Any:
        """That of an engine whose worker is in this process."""
        return self.core.model_executor.driver_worker.worker.model_runner

    def params(self, ask: Ask) -> SamplingParams:
        return SamplingParams(
            temperature=0,
            max_tokens=ask.max_tokens,
            ignore_eos=True,
            logprobs=-1,
            detokenize=False,  # decoding every log-probability's token takes longer than the model
            extra_args=dict(ask.options),
        )

    def prompt(self, ask: Ask) -> Any:
        images = ask.pictures()
        return {"prompt_token_ids": list(ask.tokens)} | ({"multi_modal_data": {"image": images}} if images else {})

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """All together, in one batch as far as the scheduler allows."""
        outputs = self.llm.generate([self.prompt(a) for a in asks], [self.params(a) for a in asks], use_tqdm=False)
        return [_answer(output) for output in outputs]

    def add(self, request_id: str, ask: Ask) -> None:
        """Queue one request without running a step."""
        self.llm.llm_engine.add_request(request_id, self.prompt(ask), self.params(ask))

    def step(self) -> list[Any]:
        """One engine step; returns vLLM's outputs."""
        return self.llm.llm_engine.step()

    def check_pool_is_whole(self) -> None:
        assert self.pool.get_num_free_blocks() == self.num_free_at_start
        assert not self.scheduler.requests
        if hasattr(self.scheduler, "records"):
            assert not self.scheduler.records
            assert self.scheduler.check_integrity() == []

    def answer(self, output: Any) -> Answer:
        """vLLM's output as an answer."""
        return _answer(output)

    @contextmanager
    def record_selections(self) -> Iterator[dict[int, list[list[int]]]]:
        """What every cut keeps while entered: first layer of the stage -> per image, in the order they are scored."""
        method = self.scheduler.planner.method
        methods = self.runner.model.methods
        own = methods[method]
        kept: dict[int, list[list[int]]] = {}
        methods[method] = _Recording(own, kept)
        try:
            yield kept
        finally:
            methods[method] = own


@dataclass
class _Recording:
    """A method that tells what it would keep."""

    method: Any
    kept: dict[int, list[list[int]]]

    @property
    def signal(self) -> Signal:
        signal: Signal = self.method.signal
        return signal

    def score(self, signals: Signals) -> torch.Tensor:
        scores: torch.Tensor = self.method.score(signals)
        chosen = signals.survivors[select_top(scores, signals.keep)]
        self.kept.setdefault(signals.layer, []).append(chosen.tolist())
        return scores


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    steps = completion.logprobs or []
    logits = torch.tensor([[step[token].logprob for token in range(len(step))] for step in steps])
    report = (output.kv_transfer_params or {}).get("hidrop", {})
    cached = output.num_cached_tokens or 0
    return Answer(list(completion.token_ids), logits, report, str(completion.finish_reason), cached)


def in_any_order(selections: dict[int, list[list[int]]]) -> dict[int, list[list[int]]]:
    """The V2 runner sorts a batch by its requests' numbers of tokens."""
    return {layer: sorted(images) for layer, images in selections.items()}


class _Process:
    """What a process does once that starts engine after engine; vLLM does it for each, and it takes most of a start.

    It looks through every module for kernels to replace, and collects garbage nine times, each time through all of
    PyTorch's objects.
    """

    def __init__(self) -> None:
        self.rebind = dispatcher._rebind_kernels
        self.has_started = False

    @contextmanager
    def quickly(self) -> Iterator[None]:
        """While vLLM starts or stops an engine."""
        with ExitStack() as stack:
            for name in ("collect", "freeze", "unfreeze"):
                stack.enter_context(patch.object(gc, name, lambda *_: 0))
            rebind = (lambda _: None) if self.has_started else self.rebind
            stack.enter_context(patch.object(dispatcher, "_rebind_kernels", rebind))
            yield

    def ended(self) -> None:
        """An engine has stopped: free its memory, and look no more at what was there before the second."""
        gc.collect()
        if not self.has_started:
            gc.freeze()
        self.has_started = True


_process = _Process()


@contextmanager
def engine(model: Path, hidrop: dict[str, Any] | None, **settings: Any) -> Iterator[Engine]:
    """Start an engine with this pruning choice; None is stock vLLM with its own model class."""
    ours: dict[str, Any] = {}
    if hidrop is not None:
        (stock,) = json.loads((model / "config.json").read_text())["architectures"]
        staged = {"architectures": [hidrop_architecture(stock)]}
        ours = {"hf_overrides": staged, "additional_config": {"hidrop": hidrop}}
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 2048,
        "block_size": 32,
        "limit_mm_per_prompt": {"image": 8},
        "distributed_executor_backend": "uni",
        "logprobs_mode": "raw_logits",
        "max_logprobs": -1,
        "num_gpu_blocks_override": 2048,
        "seed": 0,
    }
    with _process.quickly():
        llm = LLM(str(model), **(defaults | ours | settings))
    try:
        running = Engine(llm)
        yield running
        running.check_pool_is_whole()
    finally:
        with _process.quickly():
            llm.llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()
        del llm
        _process.ended()
