"""Ours against stock vLLM in one pair of engines: prefill, decode, KV cache, requests at once; random weights."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from rich.progress import Progress

from vllm_hidrop.bench.paired import Pair, Workload, running_pair
from vllm_hidrop.bench.rows import Row, make_row, provenance
from vllm_hidrop.plan.costs import ideal_decode_ratio

if TYPE_CHECKING:
    from vllm_hidrop.cli.bench import Bench

TEXT = 64  # tokens of a prompt
ANSWER = 32  # tokens of an answer, where requests are counted
WARM_UPS = 2  # as in bench.paired: turns that do not count
MEMORY_IN_USE = 0.85  # of a GPU, by both engines together
CONTEXT_BYTES = 3 << 30  # of an engine beside weights and KV cache: CUDA context, graphs, activations


@dataclass(frozen=True)
class Sizes:
    """What is measured: images of a prompt, decoding requests of a step, requests at once, paired runs of each."""

    images: tuple[int, ...]
    batches: tuple[int, ...]
    concurrent: int
    runs: int

    @property
    def answer_room(self) -> int:
        """Tokens that a request generates at most."""
        return max(ANSWER, 8 * (self.runs + WARM_UPS)) + 16


ON_GPU = Sizes((1, 4, 8), (1, 32, 64), 32, 5)
ON_CPU = Sizes((1, 4), (1, 8), 8, 3)
Item = tuple[str, Callable[[Pair, Progress], list[Row]]]
"""The name of a measurement, and what makes its rows."""


@dataclass(frozen=True)
class Unmeasured:
    """A measurement without rows, and why; ``is_failure``: an engine failed."""

    name: str
    reason: str
    is_failure: bool = False


@dataclass(frozen=True)
class Timing:
    """A table to be measured on one shape."""

    bench: "Bench"
    sizes: Sizes
    memory: int | None = None  # bytes of the GPU

    def bytes_of_pair(self, batch: int) -> int:
        """Bytes on the device of both engines, with KV caches for so many requests of one image."""
        text = self.bench.known.text
        return 2 * (2 * text.num_weights + self.bench.kv_bytes(self._pool_tokens(batch)) + CONTEXT_BYTES)

    def fits(self, batch: int) -> bool:
        """Whether both engines fit onto the device with so many requests."""
        return self.memory is None or self.bytes_of_pair(batch) <= MEMORY_IN_USE * self.memory

    def _length(self, images: int) -> int:
        from vllm_hidrop.cli.bench import BLOCK_SIZE

        tokens = images * self.bench.tokens_per_image + TEXT + self.sizes.answer_room
        return -(-tokens // BLOCK_SIZE) * BLOCK_SIZE

    def _pool_tokens(self, batch: int) -> int:
        return max(batch * self._length(1), self._length(max(self.sizes.images)))

    def items(self) -> list[Item]:
        """All measurements, in order."""
        found: list[Item] = [(f"prefill and KV, {n} images", partial(self._prefill, n)) for n in self.sizes.images]
        found += [(f"decode, batch {n}", partial(self._decode, n)) for n in self.sizes.batches]
        name = f"requests/s, {self.sizes.concurrent} at once"
        return [*found, (name, partial(self._requests, self.sizes.concurrent))]

    def measure(self, deadline: float, progress: Progress) -> Iterator[Row | Unmeasured]:
        """Measure item by item until ``deadline`` (of ``time.monotonic``); what is left out is named."""
        items, names = self.items(), [name for name, _ in self.items()]
        sizes = {name: n for (name, _), n in zip(items[len(self.sizes.images) :], self._batches(), strict=True)}
        if time.monotonic() > deadline or not self.fits(1):
            reason = "memory" if not self.fits(1) else "time"
            yield from (Unmeasured(name, reason) for name in names)
            return
        fitting = [n for n in self._batches() if self.fits(n)]
        most, length = max(fitting, default=1), self._length(max(self.sizes.images))
        kv_bytes = self.bench.kv_bytes(self._pool_tokens(most))
        settings = self.bench.settings(length, max(4096, length), kv_bytes, max_num_seqs=most)
        try:
            with running_pair(*settings, progress) as pair:
                while items:
                    name, measure = items[0]
                    reason = "time" if time.monotonic() > deadline else "memory" if sizes.get(name, 1) > most else ""
                    if reason:
                        yield Unmeasured(name, reason)
                    else:
                        mode = "compiled" if self.bench.compiled else "eager"
                        yield from (row | provenance(self.bench.shape, mode) for row in measure(pair, progress))
                    items.pop(0)
        except ValueError as error:
            yield from (Unmeasured(name, str(error), is_failure=True) for name, _ in items)

    def _batches(self) -> tuple[int, ...]:
        return (*self.sizes.batches, self.sizes.concurrent)

    def _prefill(self, images: int, pair: Pair, progress: Progress) -> list[Row]:
        bench, what = self.bench, f"{images} image{'s' if images > 1 else ''} + {TEXT} text"
        name = bench.name("prefill", "image", what)
        measured = pair.measure(Workload(images, TEXT), self.sizes.runs, progress, name)
        costs = bench.costs(images, TEXT, measured.kept)
        times = (1000 * measured.seconds(0), 1000 * measured.seconds(1))
        command = bench.command("prefill", images=images, text=TEXT, traffic="image")
        blocks = {"kv_blocks": measured.kv_blocks, "kv_blocks_planned": costs.kv_blocks}
        stock_blocks = int(measured.runs[0][0]["kv_blocks"])
        held = (stock_blocks * pair.stock.kv_bytes_per_block, measured.kv_blocks * pair.ours.kv_bytes_per_block)
        mib = (held[0] / 2**20, held[1] / 2**20)
        kv_name, kv_command = bench.name("kv", "image", f"bytes held, {what}"), bench.command("kv", images=images)
        return [
            make_row("prefill", name, times, "ms", costs.ideal_speedup_with_encoder, command=command),
            make_row("kv", kv_name, mib, "MiB", held[0] / costs.kv_token_bytes, command=kv_command, **blocks),
        ]

    def _decode(self, batch: int, pair: Pair, progress: Progress) -> list[Row]:
        name = self.bench.name("decode", "image", f"batch {batch}")
        stock, ours = pair.decode_seconds(Workload(1, TEXT, batch), self.sizes.runs, progress, name)
        ideal = ideal_decode_ratio(self.bench.known.text, self.bench.costs(1, TEXT), batch)
        command = self.bench.command("decode", batch=batch, text=TEXT, traffic="image")
        return [make_row("decode", name, (1000 * stock, 1000 * ours), "ms", ideal, command=command)]

    def _requests(self, count: int, pair: Pair, progress: Progress) -> list[Row]:
        """Requests per second of so many that arrive at once, answers included; no HTTP in between."""
        name = self.bench.name("requests/s", "image", f"{count} at once, {ANSWER} tokens each, in process")
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in progress.track(range(self.sizes.runs + 1), description=name):
            for engine in pair.in_turn(turn):
                prefill = engine.start(Workload(1, TEXT, count))["step_seconds"]
                spent = sum(prefill) + sum(engine.steps(ANSWER - 1))
                engine.stop()
                seconds[engine.is_ours] += [spent] if turn else []  # the first turn warms up
        rates = (count / median(seconds[False]), count / median(seconds[True]))
        command = self.bench.command("serve", requests=count)
        return [make_row("requests", name, rates, "requests/s", None, command=command)]


def choose_shape(shapes: tuple[str, ...], make: "Callable[[str], Timing]") -> str:
    """The first of the shapes, from large to small, of which two engines fit; the last if none does."""
    return next((shape for shape in shapes if make(shape).fits(1)), shapes[-1])
