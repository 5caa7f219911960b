"""/metrics against the responses it sums up, and in vLLM's multi-process mode."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from hidrop_server.metrics import METRICS, SERVER_LABELS, HidropMetrics, Times
from tests.server.harness import Server, image_url
from vllm_hidrop.plan.plan import ENDS_WITH_IMAGE

SUMS = {
    "vllm_hidrop_vision_tokens_in_total": "vision_tokens",
    "vllm_hidrop_layer_tokens_run_total": "layer_tokens",
    "vllm_hidrop_layer_tokens_dense_total": "layer_tokens_dense",
    "vllm_hidrop_kv_blocks_held_total": "kv_blocks",
    "vllm_hidrop_kv_blocks_dense_total": "kv_blocks_dense",
    "vllm_hidrop_kv_blocks_returned_total": "kv_blocks_returned",
    "vllm_hidrop_kv_bytes_held_total": "kv_bytes",
    "vllm_hidrop_kv_bytes_dense_total": "kv_bytes_dense",
    "vllm_hidrop_prefill_flops_run_total": "prefill_flops",
    "vllm_hidrop_prefill_flops_dense_total": "prefill_flops_dense",
    "vllm_hidrop_prefix_tokens_reused_total": "reused_tokens",
}


def test_every_sum_of_a_report_is_compared_here() -> None:
    assert {spec.shown: spec.field for spec in METRICS if spec.field} == SUMS


@pytest.mark.server
def test_counters_are_the_sums_over_the_responses(server: Server) -> None:
    before = server.metrics()
    answers = [
        server.chat([image_url(1)]),
        server.chat([image_url(1), image_url(2)], max_tokens=40, ignore_eos=True),
        server.chat([image_url(1)], vllm_xargs={"hidrop": "off"}),
        server.chat([]),
    ]
    reports = [answer["hidrop"] for answer in answers]
    stream = server.openai.chat.completions.create(**server.body([image_url(4)], stream=True))
    reports.append([chunk.model_dump() for chunk in stream][-1]["hidrop"])
    after = server.metrics()
    grown = Counter({key: after[key] - before.get(key, 0) for key in after if key[0].startswith("vllm_hidrop_")})

    def growth(name: str, **labels: str) -> float:
        wanted = set(labels.items())
        return sum(value for (found, have), value in grown.items() if found == name and wanted <= set(have))

    for name, field in SUMS.items():
        assert growth(name) == sum(report[field] for report in reports), name
    modes = Counter(report["mode"] for report in reports)
    assert modes == {"pruned": 3, "off": 1, "text": 1}
    for mode, count in modes.items():
        assert growth("vllm_hidrop_requests_total", mode=mode) == count
    assert growth("vllm_hidrop_requests_total") == len(reports)
    answered = {"handler": "/v1/chat/completions", "status": "2xx"}
    assert server.metric("http_requests_total", **answered) >= len(reports)
    for index in range(len(server.schedule.stages)):
        held = sum(report["stages"][index]["kept"] for report in reports)
        assert growth("vllm_hidrop_vision_tokens_kept_total", stage=str(index)) == held


@pytest.mark.server
def test_every_choice_is_counted(server: Server) -> None:
    requests = server.metric("vllm_hidrop_requests_total", mode="pruned")
    tokens = server.metric("vllm_hidrop_vision_tokens_in_total")
    answer = server.chat([image_url()], n=3, temperature=1.0)
    assert server.metric("vllm_hidrop_requests_total", mode="pruned") == requests + 3
    assert server.metric("vllm_hidrop_vision_tokens_in_total") == tokens + 3 * answer["hidrop"]["vision_tokens"]


def leave_early(server: Server) -> None:
    """Start a long stream and close the connection at its first line."""
    body = server.body([image_url()], stream=True, max_tokens=3000, ignore_eos=True)
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())


@pytest.mark.server
def test_a_client_that_leaves_is_counted_and_its_blocks_are_freed(server: Server) -> None:
    aborted = server.metric("vllm_hidrop_requests_total", mode="aborted")
    for _ in range(5):
        ended = server.metric("vllm_hidrop_requests_total")
        leave_early(server)
        deadline = time.monotonic() + 20
        while server.metric("vllm_hidrop_requests_total") == ended:
            assert time.monotonic() < deadline, "the request neither ended nor was aborted"
            time.sleep(0.1)
        if server.metric("vllm_hidrop_requests_total", mode="aborted") > aborted:
            break  # else: on a busy machine the first line can come after the last token
    assert server.metric("vllm_hidrop_requests_total", mode="aborted") == aborted + 1
    server.chat([])  # the gauge is of the last step
    assert server.metric("vllm:kv_cache_usage_perc") == 0


REPORT: dict[str, Any] = {
    "mode": "pruned",
    "method": "hidrop",
    "fallback": None,
    "vision_tokens": 5,
    "layer_tokens": 7,
    "layer_tokens_dense": 9,
    "kv_blocks": 1,
    "kv_blocks_returned": 0,
    "kv_blocks_dense": 2,
    "kv_bytes": 100,
    "kv_bytes_dense": 200,
    "prefill_flops": 10**15,
    "prefill_flops_dense": 3 * 10**15,
    "cut_layer": 4,
    "exit_layer": None,
    "reused_tokens": 3,
    "reuse_off": "adaptive",
    "engine": 0,
    "selection_ms": 1.5,
    "stages": [
        {"first_layer": 0, "end_layer": 4, "kept": 5, "cached": 5},
        {"first_layer": 4, "end_layer": 5, "kept": 3, "cached": 3},
    ],
}
COUNT = f"""
from hidrop_server.metrics import HidropMetrics
HidropMetrics("m", "hidrop", [0, 4], {{"preset": "p", "positions": "persistent", "version": "1"}}).ended({REPORT!r})
"""
SHOW = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_several_processes_count_into_one(tmp_path: Path) -> None:
    def run(code: str) -> str:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    run(COUNT)
    run(COUNT)
    shown = run(SHOW)

    families = text_string_to_metric_families(shown)
    samples = {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}
    ours = {"engine": "0", "method": "hidrop", "model_name": "m"}

    def sample(name: str, **labels: str) -> float:
        return samples[name, frozenset({**ours, **labels}.items())]

    assert sample("vllm_hidrop_layer_tokens_run_total") == 14
    assert sample("vllm_hidrop_prefill_flops_run_total") == 2 * 10**15
    assert sample("vllm_hidrop_cut_layer_bucket", le="4.0") == 2
    assert sample("vllm_hidrop_exit_layer_count") == 0
    assert sample("vllm_hidrop_requests_total", mode="pruned") == 2
    assert sample("vllm_hidrop_vision_tokens_kept_total", stage="1") == 6
    assert sample("vllm_hidrop_prefix_tokens_reused_total") == 6
    assert sample("vllm_hidrop_prefix_reuse_off_total", reuse_off="adaptive") == 2
    assert sample("vllm_hidrop_plan_info", preset="p", positions="persistent", version="1") == 1
    assert sample("vllm_hidrop_stage_first_layer", stage="1") == 4


def counted(
    *reports: dict[str, Any], times: Times | None = None
) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What a fresh registry shows after these reports, without our own labels."""
    registry = CollectorRegistry()
    info = {"preset": "p", "positions": "persistent", "version": "1"}
    metrics = HidropMetrics("m", "hidrop", [0, 4], info, registry)
    for report in reports:
        metrics.ended(report, times=times)
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k not in SERVER_LABELS)): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_engines_of_one_server_are_counted_apart() -> None:
    registry = CollectorRegistry()
    info = {"preset": "p", "positions": "persistent", "version": "1"}
    metrics = HidropMetrics("m", "hidrop", [0, 4], info, registry, num_engines=2)
    before = {tuple(sample.labels.items()) for family in registry.collect() for sample in family.samples}
    for report in (REPORT, REPORT | {"engine": 1}, REPORT | {"engine": 1}, None):
        metrics.ended(report)
    after = {tuple(sample.labels.items()) for family in registry.collect() for sample in family.samples}
    assert after == before, "every series is there before the first request"

    def value(name: str, engine: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "m", "method": "hidrop", "engine": engine, **labels})

    assert [value("vllm_hidrop_vision_tokens_in_total", engine) for engine in "01"] == [5, 10]
    assert [value("vllm_hidrop_prefix_reuse_off_total", engine, reuse_off="adaptive") for engine in "01"] == [1, 2]
    assert [value("vllm_hidrop_requests_total", engine, mode="unreported") for engine in "01"] == [1, 0]
    assert [value("vllm_hidrop_plan_info", engine, **info) for engine in "01"] == [1, 1]


def test_the_keep_ratio_is_the_mean_over_layers() -> None:
    shown = counted(REPORT, REPORT | {"mode": "text", "vision_tokens": 0})
    assert shown["vllm_hidrop_keep_ratio_count", frozenset()] == 1
    assert shown["vllm_hidrop_keep_ratio_sum", frozenset()] == pytest.approx((4 * 5 + 1 * 3) / (5 * 5))


def test_selection_is_timed_for_pruned_sequences_only() -> None:
    shown = counted(REPORT, REPORT | {"mode": "off"})
    assert shown["vllm_hidrop_selection_seconds_count", frozenset()] == 1
    assert shown["vllm_hidrop_selection_seconds_sum", frozenset()] == 0.0015


def test_a_fallback_is_counted_with_its_reason() -> None:
    shown = counted(REPORT | {"mode": "fallback", "fallback": ENDS_WITH_IMAGE})
    assert shown["vllm_hidrop_fallback_requests_total", frozenset({("reason", "ends_with_image")})] == 1
    assert shown["vllm_hidrop_requests_total", frozenset({("mode", "fallback")})] == 1


def test_times_are_kept_apart_by_mode() -> None:
    shown = counted(REPORT, REPORT | {"mode": "off"}, times=Times(0.5, 0.25, None))
    for mode in ("pruned", "off"):
        assert shown["vllm_hidrop_time_to_first_token_seconds_sum", frozenset({("mode", mode)})] == 0.5
        assert shown["vllm_hidrop_prefill_seconds_sum", frozenset({("mode", mode)})] == 0.25
        assert shown["vllm_hidrop_time_per_output_token_seconds_count", frozenset({("mode", mode)})] == 0


def test_every_series_is_there_before_the_first_request() -> None:
    """Prometheus does not see the first value of a new series as growth."""
    fallback = REPORT | {"mode": "fallback", "fallback": ENDS_WITH_IMAGE}
    assert counted(REPORT, fallback, times=Times(1, 1, 1)).keys() == counted().keys()
