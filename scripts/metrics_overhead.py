"""What reports and metrics cost: processor time in our accounting, per request and as a share of the engine's steps.

``python scripts/metrics_overhead.py [MODEL] [--requests N]`` runs one engine in this process, without HTTP. Processor
time of the one thread that does everything is stretched less by a busy machine than wall time.
"""

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

CONCURRENCY = 4
TEXT_TOKENS, OUTPUT_TOKENS = 24, 16
WARM_UP = 10
LOOKS = 10_000
BUDGET = 0.005


class Clock:
    """Processor seconds by name of the wrapped method, less the cost of reading the clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        start = time.thread_time()
        for _ in range(LOOKS):
            time.thread_time()
        self.look = (time.thread_time() - start) / LOOKS

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time every later call of a method of an object or class."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += time.thread_time() - start - self.look

        setattr(owner, method, timed)


def make_engine(model: str | None, clock: Clock) -> Any:
    """An engine in this process with the server's output processor, timed."""
    from vllm.v1.engine.llm_engine import LLMEngine

    from hidrop_server.control.choice import check_choice
    from hidrop_server.engine import HidropOutputProcessor, metrics_of
    from hidrop_server.start import configure
    from vllm_hidrop.plan.planner import Planner

    _, config = configure(model, check_choice({}), ["--distributed-executor-backend", "uni"])
    engine = LLMEngine.from_vllm_config(config)
    metrics, stock = metrics_of(config, Planner.from_vllm_config(config)), engine.output_processor
    processor = HidropOutputProcessor(
        metrics, stock.tokenizer, log_stats=stock.log_stats, stream_interval=stock.stream_interval
    )
    engine.output_processor = processor
    clock.wrap(processor, "_hand_on", "handing on")
    clock.wrap(processor.metrics, "ended", "counting")
    clock.wrap(engine.engine_core, "get_output", "engine")
    clock.wrap(engine.engine_core.engine_core.scheduler, "_report", "reports")
    return engine


def make_prompt(config: Any, index: int) -> dict[str, Any]:
    """An image of noise, new to the engine, and some words."""
    from PIL import Image

    rng = np.random.default_rng(index)
    size = config.vision_config.image_size
    others = [token for token in range(config.text_config.vocab_size) if token != config.image_token_index]
    words = rng.choice(others, TEXT_TOKENS).tolist()
    image = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
    return {"prompt_token_ids": [1, config.image_token_index, *words], "multi_modal_data": {"image": image}}


def run(engine: Any, numbers: range) -> dict[str, Any]:
    """Answer the numbered requests, :data:`CONCURRENCY` at a time; returns the last report."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    config, waiting = engine.model_config.hf_config, list(numbers)
    report: dict[str, Any] = {}
    while waiting or engine.has_unfinished_requests():
        while waiting and engine.get_num_unfinished_requests() < CONCURRENCY:
            number = waiting.pop()
            engine.add_request(str(number), make_prompt(config, number), params)
        for output in engine.step():
            report = (output.kv_transfer_params or {}).get("hidrop", report)
    return report


def carrying(report: dict[str, Any]) -> float:
    """Seconds to encode and decode one report, as between processes."""
    import msgspec

    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode
    start = time.thread_time()
    for _ in range(1000):
        decode(encode(report))
    return (time.thread_time() - start) / 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the embedded one")
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    clock = Clock()
    engine = make_engine(arguments.model, clock)
    run(engine, range(WARM_UP))
    clock.seconds.clear()
    report = run(engine, range(WARM_UP, WARM_UP + arguments.requests))
    per_request = {name: seconds / arguments.requests for name, seconds in clock.seconds.items()}
    parts = {
        "two reports made (engine)": per_request["reports"],
        "two reports carried (between processes)": 2 * carrying(report),
        "reports handed on (server)": per_request["handing on"],
        "metrics counted (server)": per_request["counting"],
    }
    for name, seconds in parts.items():
        print(f"{name:42}{1e6 * seconds:8.1f} us  {seconds / per_request['engine']:7.3%}")
    total = sum(parts.values())
    print(f"{'all':42}{1e6 * total:8.1f} us  {total / per_request['engine']:7.3%} (budget {BUDGET:.1%})")
    print(f"{'steps of the engine':42}{1e3 * per_request['engine']:8.1f} ms a request")


if __name__ == "__main__":
    main()
