"""Time spent in parts of a step, on the device that does the work."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Timer:
    """Adds up the time of the passages that run under it; on CUDA by events in the stream, so that no step waits."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.on_host = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time a passage."""
        if self.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.events.append((start, end))
        else:
            begun = perf_counter()
            yield
            self.on_host += perf_counter() - begun

    def seconds(self) -> float:
        """The sum; once the device has done the work: else this waits for it."""
        for _, end in self.events[-1:]:
            end.synchronize()
        return self.on_host + sum(start.elapsed_time(end) for start, end in self.events) / 1000
