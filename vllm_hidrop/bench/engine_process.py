"""One in-process vLLM engine driven over pipes: the child side of a paired measurement.

Started as ``python -m vllm_hidrop.bench.engine_process`` with the engine's settings as a JSON line on standard input;
then one JSON line per request in, one with its timings out. vLLM's own output goes to standard error.
"""

import json
import os
import sys
import time
from typing import Any, TextIO


def main() -> None:
    """Serve measurements until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    engine = MeasuredEngine(settings)
    _reply(replies, {"ready": True, "kv_bytes_per_block": engine.kv_bytes_per_block})
    for number, line in enumerate(sys.stdin):
        _reply(replies, engine.measure(str(number), **json.loads(line)))


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


class MeasuredEngine:
    """An engine whose steps are timed from the moment a request is queued, preprocessing excluded."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        self.engine: Any = LLM(**settings).llm_engine
        self.core = self.engine.engine_core.engine_core
        groups = self.core.scheduler.kv_cache_config.kv_cache_groups
        # One block id stands for a page of every layer of its group; the widest group sets what it costs.
        self.kv_bytes_per_block = max(g.kv_cache_spec.page_size_bytes * len(g.layer_names) for g in groups)

    def measure(self, name: str, images: int, text: int, max_tokens: int, seed: int) -> dict[str, Any]:
        """Run one request alone.

        Args:
            name: request id.
            images: noise images, before the text.
            text: text tokens of the prompt, the first one included.
            max_tokens: tokens to generate.
            seed: of pixels and tokens.

        Returns:
            ``step_seconds`` (the first is the prefill, tower included), ``kv_blocks`` held after prefill, ``tokens``,
            and the engine's ``report`` if it is ours.
        """
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.add_request(name, _prompt(images, text, seed), params)
        step_seconds: list[float] = []
        kv_blocks = 0
        outputs: list[Any] = []
        free = self._num_free()
        while self.engine.has_unfinished_requests():
            start = time.perf_counter()
            outputs = self.engine.step()
            step_seconds.append(time.perf_counter() - start)
            kv_blocks = kv_blocks or free - self._num_free()
        return {
            "step_seconds": step_seconds,
            "kv_blocks": kv_blocks,
            "tokens": list(outputs[0].outputs[0].token_ids),
            "report": (outputs[0].kv_transfer_params or {}).get("hidrop"),
        }

    def _num_free(self) -> int:
        return int(self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def _prompt(images: int, text: int, seed: int) -> dict[str, Any]:
    import numpy as np
    from PIL import Image

    from vllm_hidrop.bench.shapes import IMAGE_TOKEN

    rng = np.random.default_rng(seed)
    tokens = [1] + [IMAGE_TOKEN] * images + rng.integers(4, IMAGE_TOKEN, text - 1).tolist()
    pictures = [Image.fromarray(rng.integers(0, 256, (336, 336, 3), dtype=np.uint8)) for _ in range(images)]
    return {"prompt_token_ids": tokens} | ({"multi_modal_data": {"image": pictures}} if images else {})


if __name__ == "__main__":
    main()
