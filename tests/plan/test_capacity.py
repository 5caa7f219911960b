"""From a plan to machines: what must hold of the arithmetic."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from vllm_hidrop.cli.app import app
from vllm_hidrop.plan.capacity import Capacity, Machine, Request, capacity
from vllm_hidrop.plan.shapes import LLAVA_7B

MACHINE = Machine(4e14, 2.4e12, 50 * 2**30, 1024)
REQUEST = Request(8e12, 3e8, 128)
GPU = ("--tflops", "400", "--bandwidth", "2400", "--kv-gib", "50")


def test_a_request_costs_its_prefill_and_its_share_of_the_decode_steps() -> None:
    found = capacity(LLAVA_7B, MACHINE, REQUEST)
    token = 32 * LLAVA_7B.kv_bytes_per_row
    assert found.sequences == int(50 * 2**30 / (3e8 + 128 * token))
    assert capacity(LLAVA_7B, replace(MACHINE, most_sequences=9), REQUEST).sequences == 9
    assert found.prefill_seconds == pytest.approx(0.02)
    weights = 2 * LLAVA_7B.num_weights
    assert found.step_seconds == pytest.approx((weights + found.sequences * (3e8 + 64 * token)) / 2.4e12)
    seconds_of_all = found.sequences * found.prefill_seconds + 128 * found.step_seconds
    assert found.requests_per_second == pytest.approx(found.sequences / seconds_of_all)


def test_a_step_that_computes_longer_than_it_reads_takes_its_compute() -> None:
    found = capacity(LLAVA_7B, Machine(1e12, 1e18, 50 * 2**30, 1024), REQUEST)
    assert found.step_seconds == pytest.approx(2 * LLAVA_7B.num_weights * found.sequences / 1e12)


@pytest.mark.parametrize(
    "better",
    [
        (Machine(8e14, 2.4e12, 50 * 2**30, 1024), REQUEST),
        (Machine(4e14, 4.8e12, 50 * 2**30, 1024), REQUEST),
        (Machine(4e14, 2.4e12, 100 * 2**30, 1024), REQUEST),
        (MACHINE, Request(4e12, 3e8, 128)),
        (MACHINE, Request(8e12, 1e8, 128)),
        (MACHINE, Request(8e12, 3e8, 64)),
    ],
)
def test_less_work_or_more_machine_never_holds_less(better: tuple[Machine, Request]) -> None:
    assert capacity(LLAVA_7B, *better).requests_per_second > capacity(LLAVA_7B, MACHINE, REQUEST).requests_per_second


def test_machines_are_whole_and_leave_headroom() -> None:
    found = Capacity(1, 1, 1, requests_per_second=10)
    assert [found.machines(rate, 0.3) for rate in (0.1, 7, 7.01, 21)] == [1, 1, 2, 3]


def test_a_request_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one request holds 0\.3\d GiB of KV, the pool has 0\.10"):
        capacity(LLAVA_7B, Machine(1e14, 1e12, 0.1 * 2**30, 1024), REQUEST)


def test_the_command_compares_with_dense() -> None:
    told = CliRunner().invoke(app, ["capacity", "7b", "--method", "hidrop", "--preset", "tok64", *GPU, "--json"])
    assert told.exit_code == 0, told.stderr
    dense, pruned = json.loads(told.stdout).values()
    assert dense["sequences"] < pruned["sequences"]
    assert dense["prefill_seconds"] == pytest.approx((8397091504128 + 390193049600) / 4e14)
    assert pruned["prefill_seconds"] == pytest.approx((1726217535488 + 390193049600) / 4e14)
    assert dense["machines"] >= pruned["machines"]


def test_the_command_refuses_in_one_line() -> None:
    told = CliRunner().invoke(app, ["capacity", "7b", "--tflops", "1", "--bandwidth", "1", "--kv-gib", "0.01"])
    assert told.exit_code == 2
    assert "one request holds" in told.stderr
