"""An in-process vLLM engine driven over pipes, one side of a paired measurement: settings, then a command per line."""

import time
from typing import Any

from vllm_hidrop.bench.piped import serve_lines

PATIENCE = 3  # steps without a new first token until the rest is taken to wait for blocks
ENDLESS = 10_000


class MeasuredEngine:
    """An engine whose steps are timed from the moment the requests are queued, preprocessing excluded."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        from vllm import LLM

        if torch.cuda.is_available():
            settings["gpu_memory_utilization"] = 0.4  # two engines share the device; the pool's bytes are given
        self.image_size = tuple(settings.pop("image_size"))
        self.engine: Any = LLM(**settings).llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        groups = self.scheduler.kv_cache_config.kv_cache_groups
        # One block id stands for a page of every layer of its group; the widest group sets what it costs.
        self.kv_bytes_per_block = max(g.kv_cache_spec.page_size_bytes * len(g.layer_names) for g in groups)
        self.num_asked = 0
        self.running: dict[str, int] = {}

    def start(self, images: int, text: int, count: int, off: bool, seed: int, picture_seed: int) -> dict[str, Any]:
        """Queue ``count`` requests at once and step until each has its first token, or no more fit.

        A prompt is ``images`` noise images of ``picture_seed`` and ``text`` tokens of ``seed``, BOS included.

        Returns:
            ``step_seconds`` (of one request: the prefill, tower included), ``kv_blocks`` held at the end, ``num_held``
            requests that have a first token and were not preempted since, and the first request's ``report`` (or None).
        """
        from vllm import SamplingParams

        extra = {"hidrop": "off"} if off else None
        params = SamplingParams(temperature=0, max_tokens=ENDLESS, ignore_eos=True, extra_args=extra)
        for index in range(count):
            name = str(self.num_asked)
            self.num_asked += 1
            pictures = _pictures(images, self.image_size, (picture_seed, index))
            self.engine.add_request(name, _prompt(pictures, text, (seed, index)), params)
            self.running[name] = 0
        first = next(iter(self.running))
        free, report, step_seconds, patience = self._num_free(), None, [], PATIENCE
        while patience and not all(self.running.values()):
            before = sum(1 for tokens in self.running.values() if tokens)
            seconds, outputs = self._step()
            step_seconds.append(seconds)
            found = [(o.kv_transfer_params or {}).get("hidrop") for o in outputs if o.request_id == first]
            report = report or next(iter(found), None)
            gained = sum(1 for tokens in self.running.values() if tokens) > before
            patience = PATIENCE if gained else patience - 1
        return {
            "step_seconds": step_seconds,
            "kv_blocks": free - self._num_free(),
            "num_held": sum(1 for request in self.scheduler.running if request.num_output_tokens),
            "report": report,
        }

    def steps(self, count: int) -> dict[str, Any]:
        """Time so many steps of the requests that were started."""
        return {"step_seconds": [self._step()[0] for _ in range(count)]}

    def stop(self) -> dict[str, Any]:
        """Abort all requests and step until the engine is idle."""
        self.engine.abort_request(list(self.running))
        self.running.clear()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {}

    def _step(self) -> tuple[float, list[Any]]:
        start = time.perf_counter()
        outputs = self.engine.step()
        seconds = time.perf_counter() - start
        for output in outputs:
            self.running[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                ended = output.outputs[0]
                raise RuntimeError(f"request {output.request_id} ended: {ended.finish_reason}: {ended.stop_reason}")
        return seconds, outputs

    def _num_free(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def _pictures(count: int, size: tuple[int, ...], seed: tuple[int, int]) -> list[Any]:
    import numpy as np
    from PIL import Image

    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def _prompt(pictures: list[Any], text: int, seed: tuple[int, int]) -> dict[str, Any]:
    import numpy as np

    from vllm_hidrop.bench.shapes import IMAGE_TOKEN

    words = np.random.default_rng(seed).integers(4, IMAGE_TOKEN, text - 1).tolist()
    tokens = [1] + [IMAGE_TOKEN] * len(pictures) + words
    return {"prompt_token_ids": tokens} | ({"multi_modal_data": {"image": pictures}} if pictures else {})


def main() -> None:
    """Serve measurements until standard input ends."""
    engines: list[MeasuredEngine] = []

    def make(settings: dict[str, Any]) -> dict[str, Any]:
        engines.append(MeasuredEngine(settings))
        return {"kv_bytes_per_block": engines[0].kv_bytes_per_block}

    serve_lines(make, lambda command: getattr(engines[0], command.pop("do"))(**command))


if __name__ == "__main__":
    main()
