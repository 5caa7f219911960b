"""Two servers behind vllm-router on loopback: load is spread, and a server that is killed costs no request."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.harness import image_url, user
from tests.server.processes import api_process
from vllm_hidrop.cli.local_server import LOOPBACK, end_group, free_port, local_server
from vllm_hidrop.monitoring.prometheus import Prometheus, running

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]

ROUTER = Path(sys.executable).with_name("vllm-router")
MODEL = "hidrop-embedded"


@dataclass(frozen=True)
class Cluster:
    """Addresses of the router, of its metrics, and of the servers behind it; and who scrapes all three."""

    router: str
    router_metrics: str
    servers: tuple[str, str]
    prometheus: Prometheus

    def up(self) -> set[str]:
        """Addresses that Prometheus could scrape last."""
        return {f"http://{series.labels['instance']}" for series in self.prometheus.query("up == 1")}

    def ask(self, seed: int, tokens: int = 4) -> int:
        """Status of one request, another image each."""
        body: dict[str, Any] = {"model": MODEL, "messages": [user([image_url(seed)], "what colour is the circle ?")]}
        body |= {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return httpx.post(f"{self.router}/v1/chat/completions", json=body, timeout=300).status_code


def finished(server: str) -> float:
    """Requests a server has answered."""
    return _sum(f"{server}/metrics", "vllm:request_success_total")


def in_flight(server: str) -> float:
    return _sum(f"{server}/metrics", "vllm:num_requests_running")


def _sum(url: str, name: str) -> float:
    families = text_string_to_metric_families(httpx.get(url, timeout=30).text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


@contextmanager
def router(servers: tuple[str, str], log: Path) -> Iterator[tuple[str, str]]:
    """The command that docs/scaling.md names, on free ports."""
    port, metrics_port = free_port(), free_port()
    command = [str(ROUTER), "--host", LOOPBACK, "--port", str(port), "--worker-urls", *servers]
    command += ["--policy", "round_robin", "--health-check-endpoint", "/ready", "--health-check-interval-secs", "1"]
    command += ["--prometheus-host", LOOPBACK, "--prometheus-port", str(metrics_port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            url = f"http://{LOOPBACK}:{port}"
            deadline = time.monotonic() + 120
            while not _is_ready(url):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield url, f"http://{LOOPBACK}:{metrics_port}"
        finally:
            end_group(process)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # for the servers' processes only
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            servers = tuple(stack.enter_context(local_server([], on_wait=lambda: None)) for _ in range(2))
        assert len(servers) == 2
        log = tmp_path_factory.mktemp("router") / "router.log"
        url, metrics = stack.enter_context(router(servers, log))
        scraping = stack.enter_context(running([metrics, *servers], scrape_seconds=1))
        yield Cluster(url, metrics, servers, scraping)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_requests_are_spread_over_both_servers_and_prometheus_scrapes_all_three(cluster: Cluster) -> None:
    before = [finished(server) for server in cluster.servers]
    assert [cluster.ask(seed) for seed in range(8)] == [200] * 8
    answered = [finished(server) - count for server, count in zip(cluster.servers, before, strict=True)]
    assert answered == [4, 4]
    until(lambda: cluster.up() == {cluster.router_metrics, *cluster.servers})
    by_server = "sum by (instance) (vllm_hidrop_requests_total)"
    until(lambda: [s.points[0][1] for s in cluster.prometheus.query(by_server)] == [b + 4 for b in before])
    assert cluster.prometheus.query(f'count({{instance="{cluster.router_metrics.removeprefix("http://")}"}}) > 10')


def test_a_server_killed_under_load_costs_no_request(cluster: Cluster) -> None:
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(cluster.ask, 100 + seed, 1500) for seed in range(12)]
        until(lambda: all(in_flight(server) > 1 for server in cluster.servers))
        # The server and its engine at once, as a machine that loses its power.
        os.killpg(os.getpgid(api_process(cluster.servers[1]).pid), signal.SIGKILL)
        assert [answer.result() for answer in asked] == [200] * 12
    assert [cluster.ask(200 + seed) for seed in range(6)] == [200] * 6
    until(lambda: cluster.up() == {cluster.router_metrics, cluster.servers[0]})
