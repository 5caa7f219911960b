"""/metrics against the responses it sums up, and in vLLM's multi-process mode."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.server.harness import Server, image_url

SUMS = {
    "vllm_hidrop_vision_tokens_in_total": "vision_tokens",
    "vllm_hidrop_layer_tokens_run_total": "layer_tokens",
    "vllm_hidrop_layer_tokens_dense_total": "layer_tokens_dense",
    "vllm_hidrop_kv_blocks_held_total": "kv_blocks",
    "vllm_hidrop_kv_blocks_dense_total": "kv_blocks_dense",
    "vllm_hidrop_kv_blocks_returned_total": "kv_blocks_returned",
    "vllm_hidrop_prefix_tokens_reused_total": "reused_tokens",
}


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


COUNT = """
from hidrop_server.metrics import HidropMetrics
report = {"mode": "pruned", "method": "hidrop", "vision_tokens": 5, "layer_tokens": 7, "layer_tokens_dense": 9,
          "kv_blocks": 1, "kv_blocks_returned": 0, "kv_blocks_dense": 2, "cut_layer": 4, "exit_layer": None,
          "reused_tokens": 3, "reuse_off": "adaptive",
          "stages": [{"kept": 5, "cached": 5}, {"kept": 3, "cached": 3}]}
HidropMetrics("m", "hidrop", [0, 4]).ended(report)
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
    assert 'vllm_hidrop_layer_tokens_run_total{method="hidrop",model_name="m"} 14.0' in shown
    assert 'vllm_hidrop_cut_layer_bucket{le="4.0",method="hidrop",model_name="m"} 2.0' in shown
    assert 'vllm_hidrop_exit_layer_count{method="hidrop",model_name="m"} 0.0' in shown
    assert 'vllm_hidrop_requests_total{method="hidrop",mode="pruned",model_name="m"} 2.0' in shown
    assert 'vllm_hidrop_vision_tokens_kept_total{method="hidrop",model_name="m",stage="1"} 6.0' in shown
    assert 'vllm_hidrop_prefix_tokens_reused_total{method="hidrop",model_name="m"} 6.0' in shown
    assert 'vllm_hidrop_prefix_reuse_off_total{method="hidrop",model_name="m",reuse_off="adaptive"} 2.0' in shown
