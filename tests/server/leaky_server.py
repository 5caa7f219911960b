"""``hidrop serve`` with a scheduler that loses one block with every request for ``LEAK_TOKENS`` tokens.

Run as a module: the engine's process, however it is started, then has this scheduler too.
"""

from typing import Any

from vllm_hidrop.engine.scheduler import StagedScheduler

LEAK_TOKENS = 7


class LeakyScheduler(StagedScheduler):
    """Stands in for the real one, under its name."""

    def add_request(self, request: Any) -> None:
        """Take a block out of the free list for nobody."""
        super().add_request(request)
        if request.max_tokens == LEAK_TOKENS:
            self.kv_cache_manager.block_pool.free_block_queue.popleft()


if __name__ in ("__main__", "__mp_main__"):
    import vllm_hidrop.engine.scheduler

    vllm_hidrop.engine.scheduler.StagedScheduler = LeakyScheduler  # type: ignore[misc]
if __name__ == "__main__":
    from vllm_hidrop.cli.app import app

    app()
