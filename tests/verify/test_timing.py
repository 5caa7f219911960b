"""Which rows of the table are measured, and that the others are named; no engine runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from rich.progress import Progress

from vllm_hidrop.cli.bench import TOK48, Bench
from vllm_hidrop.verify import timing
from vllm_hidrop.verify.timing import ON_GPU, Timing, Unmeasured, choose_shape

GIB = 1 << 30
NAMES = [
    *("prefill and KV, 1 images", "prefill and KV, 4 images", "prefill and KV, 8 images"),
    *("decode, batch 1", "decode, batch 32", "decode, batch 64", "requests/s, 32 at once"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def table(shape: str, memory: int | None) -> Timing:
    return Timing(Bench(shape, 3, 1, True, TOK48, dummy=True), ON_GPU, memory)


def measured(wanted: Timing, deadline: float) -> dict[str, str]:
    found = list(wanted.measure(deadline, Progress(disable=True)))
    return {each.name: each.reason for each in found if isinstance(each, Unmeasured)}


def test_what_does_not_fit_into_the_time_or_the_memory_is_named() -> None:
    assert measured(table("tiny", None), time.monotonic() - 1) == dict.fromkeys(NAMES, "time")
    assert measured(table("7b", 24 * GIB), time.monotonic() + 60) == dict.fromkeys(NAMES, "memory")


def test_an_engine_that_fails_fails_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def failing(*_: Any) -> Iterator[Any]:
        raise ValueError("the measured process ended: CUDA error")
        yield

    monkeypatch.setattr(timing, "running_pair", failing)
    found = list(table("tiny", None).measure(time.monotonic() + 60, Progress(disable=True)))
    assert [each.name for each in found if isinstance(each, Unmeasured) and each.is_failure] == NAMES


@pytest.mark.parametrize(("gib", "shape"), [(139, "7b"), (80, "7b"), (24, "2.7b"), (8, "bench")])
def test_the_largest_shape_is_taken_of_which_two_engines_fit(gib: int, shape: str) -> None:
    assert choose_shape(("7b", "2.7b", "bench"), lambda name: table(name, gib * GIB)) == shape


def test_the_whole_table_of_the_7b_shape_fits_into_a_large_gpu_and_less_of_it_into_a_smaller_one() -> None:
    assert table("7b", 139 * GIB).fits(64)
    smaller = table("7b", 80 * GIB)
    assert [smaller.fits(batch) for batch in (1, 32, 64)] == [True, True, False]
