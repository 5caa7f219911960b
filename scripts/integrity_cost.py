"""What the integrity checks take: ``python scripts/integrity_cost.py [--blocks N]``.

An idle engine of the embedded model in this process, whose pool is exchanged for one of so many blocks. The sample runs
whenever the engine becomes idle, so it must stay below a millisecond whatever the pool; the check runs where readiness
is asked. Exit code 1 if the sample does not.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

RUNS = 201
GOAL_MS = 1.0


def median_ms(function: Callable[[], object], runs: int) -> float:
    """Median wall time of a call, milliseconds."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)


def idle_scheduler(num_blocks: int) -> Any:
    """The scheduler of an engine that has answered once."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.engine.llm_engine import LLMEngine

    from hidrop_server.control.choice import check_choice
    from hidrop_server.start import configure

    _, config = configure(None, check_choice({}), ["--distributed-executor-backend", "uni"])
    engine = LLMEngine.from_vllm_config(config)
    scheduler = engine.engine_core.engine_core.scheduler
    own = scheduler.kv_cache_manager.block_pool
    scheduler.kv_cache_manager.block_pool = BlockPool(num_blocks, own.enable_caching, own.hash_block_size)
    return scheduler


def main() -> int:
    """Print the two figures."""
    parser = argparse.ArgumentParser(prog="python scripts/integrity_cost.py", description=__doc__)
    parser.add_argument("--blocks", type=int, default=200_000)
    args = parser.parse_args()
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    scheduler = idle_scheduler(args.blocks)
    assert not scheduler.integrity.sample(scheduler)
    assert scheduler.check_integrity() == []
    sample_ms = median_ms(lambda: scheduler.integrity.sample(scheduler), RUNS)
    check_ms = median_ms(scheduler.check_integrity, 11)
    print(f"{args.blocks} blocks: on becoming idle {sample_ms:.3f} ms (goal {GOAL_MS:g}), on /ready {check_ms:.1f} ms")
    return int(sample_ms > GOAL_MS)


if __name__ == "__main__":
    sys.exit(main())
