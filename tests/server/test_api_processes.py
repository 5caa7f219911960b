"""`--api-server-count 2`: two processes answer as one does, count into one /metrics, and end together."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.server.harness import QUESTION, Server, image_url, user
from tests.server.processes import exit_code, left
from tests.server.test_metrics import SUMS
from vllm_hidrop.cli.local_server import local_server

pytestmark = pytest.mark.server

QUEUE = 8
FLAGS = ("--api-server-count", "2", "--max-num-queued-reqs", str(QUEUE), "--enforce-eager")


@dataclass(frozen=True)
class Pair:
    """A server, and clients that hold one connection each, some to either of its processes."""

    launcher: psutil.Process
    clients: list[Server]

    def both_have_clients(self) -> bool:
        """Whether either process has one of the connections."""
        port = int(self.clients[0].url.rpartition(":")[2])
        have = [
            any(
                connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
                for connection in worker.net_connections("tcp")
            )
            for worker in self.launcher.children()
            if "APIServer" in worker.name()
        ]
        return have == [True, True]


@contextmanager
def serving_pair() -> Iterator[Pair]:
    others = set(psutil.Process().children())
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # for the server's process only
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            url = stack.enter_context(local_server(FLAGS, on_wait=lambda: None))
        (launcher,) = (child for child in set(psutil.Process().children()) - others if "tracker" not in child.name())
        openai = stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none"))
        pair = Pair(launcher, [])
        deadline = time.monotonic() + 60
        while len(pair.clients) < 4 or not pair.both_have_clients():  # the second process may come up later
            assert time.monotonic() < deadline, "one process takes every connection"
            http = stack.enter_context(httpx.Client(base_url=url, timeout=120))
            pair.clients.append(Server(url, http, openai))
            assert http.get("/ready").status_code == 200
            time.sleep(0.2)
        yield pair


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with serving_pair() as started:
        yield started


def test_counters_of_both_processes_are_the_sums_over_the_responses(pair: Pair) -> None:
    before = pair.clients[0].metrics()
    reports = []
    for seed, client in enumerate(pair.clients):
        reports.append(client.chat([image_url(seed)])["hidrop"])
        reports.append(client.chat([image_url(7)], vllm_xargs={"hidrop": "off"} if seed % 2 else {})["hidrop"])
        reports.append(client.chat([])["hidrop"])
        bad = client.http.post("/v1/chat/completions", json=client.body([], vllm_xargs={"hidrop_no": 1}))
        assert bad.status_code == 400
    assert pair.both_have_clients(), "both have answered"
    modes = Counter(report["mode"] for report in reports)
    assert modes.keys() == {"pruned", "off", "text"}
    for client in pair.clients:
        after = client.metrics()

        def growth(name: str, after: Any = after, **labels: str) -> float:
            wanted = set(labels.items())
            return sum(
                value - before.get(key, 0) for key, value in after.items() if key[0] == name and wanted <= {*key[1]}
            )

        for name, field in SUMS.items():
            assert growth(name) == sum(report[field] for report in reports), name
        assert growth("vllm_hidrop_requests_total") == len(reports)
        for mode, count in modes.items():
            assert growth("vllm_hidrop_requests_total", mode=mode) == count
            assert growth("vllm_hidrop_time_to_first_token_seconds_count", mode=mode) == count
        assert growth("vllm_hidrop_refused_requests_total", reason="options") == len(pair.clients)
        assert growth("vllm:request_success_total") == len(reports)
        assert growth("http_requests_total", handler="/v1/chat/completions", status="2xx") == len(reports)
        shown = [line.rpartition(" ")[0] for line in client.http.get("/metrics").text.splitlines()]
        assert [name for name, count in Counter(shown).items() if count > 1] == []
        assert client.metric("vllm_hidrop_plan_info") == 1
        first_layers = sorted(value for (name, _), value in after.items() if name == "vllm_hidrop_stage_first_layer")
        assert first_layers == [stage.first_layer for stage in client.schedule.stages]


def test_the_queue_is_bounded_over_both_and_one_counts_what_the_other_aborts(pair: Pair) -> None:
    first, *others = pair.clients
    aborted = first.metric("vllm_hidrop_requests_total", mode="aborted")
    body = first.body([image_url()], n=QUEUE, stream=True, max_tokens=3000, ignore_eos=True, temperature=1)
    with first.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()  # without a name it would end, and with it the request
        next(lines)
        refused = [other.http.post("/v1/chat/completions", json=other.body([])) for other in others]
    assert [each.status_code for each in refused] == [503] * len(others)
    assert {each.headers["Retry-After"] for each in refused} == {"1"}
    deadline = time.monotonic() + 60
    for other in others:
        while other.metric("vllm_hidrop_requests_total", mode="aborted") < aborted + QUEUE:
            assert time.monotonic() < deadline, "the choices were not aborted"
            time.sleep(0.1)


def test_a_signal_ends_all_of_it_once_both_have_answered(pair: Pair) -> None:
    """The last test of this server."""
    processes = pair.launcher.children(recursive=True)
    body = {"model": pair.clients[0].model, "messages": [user([image_url()], QUESTION)], "stream": True}
    body |= {"ignore_eos": True, "max_tokens": 300, "stream_options": {"include_usage": True}}
    with ExitStack() as stack:
        streams = [
            stack.enter_context(client.http.stream("POST", "/v1/chat/completions", json=body)).iter_lines()
            for client in pair.clients
        ]
        for lines in streams:
            next(lines)
        assert pair.both_have_clients()
        pair.launcher.send_signal(signal.SIGTERM)
        for lines in streams:
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
            assert chunks[-1]["usage"]["completion_tokens"] == 300
    assert exit_code(pair.launcher) == 0
    assert not left(processes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["APIServer_1", "EngineCore"])
def test_the_death_of_one_process_ends_all_with_exit_code_1(name: str) -> None:
    with serving_pair() as pair:
        processes = pair.launcher.children(recursive=True)
        (victim,) = (child for child in pair.launcher.children() if name in child.name())  # its own child has its name
        os.kill(victim.pid, signal.SIGKILL)
        assert exit_code(pair.launcher) == 1
        assert not left(processes)  # a worker whose engine was killed notices by itself
