"""guidellm and Ray Serve drive `hidrop serve` from environments of their own, which the variables below name."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.harness import Server, image_url, user
from tests.server.processes import api_process
from vllm_hidrop.cli.local_server import LOOPBACK, end_group, free_port

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SERVERS = [f"http://{LOOPBACK}:{port}" for port in (8101, 8102)]


def program(variable: str, name: str) -> str:
    """Path of a program that is not in this environment; skips loudly without it."""
    found = os.environ.get(variable) or shutil.which(name)
    if not found:
        pytest.skip(f"NOT TESTED: {name} is missing; install it elsewhere and set {variable} (docs/deploy.md)")
    return found


def test_guidellm_drives_the_server(server: Server, tmp_path: Path) -> None:
    before = server.metric("vllm_hidrop_vision_tokens_in_total")
    command = [program("GUIDELLM", "guidellm"), "run", "-c", str(ROOT / "loadtests" / "guidellm.yaml")]
    command += ["--backend", f"kind=openai_http,target={server.url},request_format=/v1/chat/completions,http2=false"]
    command += ["--output", f"kind=json,path={tmp_path / 'found.json'}", "--disable-console"]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path)
    runs = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    assert len(runs) == 3
    assert server.metric("vllm_hidrop_vision_tokens_in_total") - before == 24 * 576


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def finished(server: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{server}/metrics", timeout=30).text)
    return sum(s.value for f in families for s in f.samples if s.name == "vllm:request_success_total")


def test_two_replicas_of_ray_serve_share_the_load_and_a_dead_server_is_replaced(tmp_path: Path) -> None:
    python = str(Path(program("RAY", "ray")).with_name("python"))
    url = f"http://{LOOPBACK}:{free_port()}"

    def ask(seed: int) -> int:
        body = {"model": "hidrop-embedded", "messages": [user([image_url(seed)], "what ?")], "max_tokens": 4}
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).status_code

    def ready() -> bool:
        return all(map(answers, [f"{url}/v1/models", *(f"{server}/ready" for server in SERVERS)]))

    command = [python, str(ROOT / "deploy" / "ray" / "replicas.py"), "--port", url.rpartition(":")[2]]
    environment = os.environ | {"HIDROP": str(Path(sys.executable).with_name("hidrop"))}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            until(ready)
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(ask, range(16))) == [200] * 16
            body = {"model": "hidrop-embedded", "messages": [user([image_url(50)], "what ?")], "stream": True}
            body |= {"max_tokens": 300, "ignore_eos": True}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300) as streamed:
                chunks = list(streamed.iter_raw())
            assert len(chunks) > 10
            assert chunks[-1].endswith(b"data: [DONE]\n\n")
            assert min(finished(server) for server in SERVERS) > 2
            os.kill(api_process(SERVERS[1]).pid, signal.SIGKILL)
            until(lambda: not answers(f"{SERVERS[1]}/health"))
            until(ready)
            assert finished(SERVERS[1]) == 0
            assert [ask(100 + seed) for seed in range(4)] == [200] * 4
        finally:
            end_group(process)
            until(lambda: not any(answers(f"{server}/health") for server in SERVERS))
