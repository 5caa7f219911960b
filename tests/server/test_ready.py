"""Readiness: 200 while the engine is up and its books add up, 503 with the reason otherwise."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable

import httpx
import psutil
import pytest

from tests.server.harness import QUESTION, Server, image_url, user
from tests.server.leaky_server import LEAK_TOKENS
from tests.server.processes import api_process, exit_code, left
from vllm_hidrop.cli.local_server import local_server

pytestmark = pytest.mark.server

COMMAND = (sys.executable, "-m", "tests.server.leaky_server", "serve")


def until(is_so: Callable[[httpx.Response], bool], http: httpx.Client) -> httpx.Response:
    """The first answer of /ready that is as it should be; the last one in the end."""
    deadline = time.monotonic() + 20
    while True:
        response = http.get("/ready")
        if is_so(response) or time.monotonic() > deadline:
            return response
        time.sleep(0.1)


def cores() -> set[int]:
    """Engine processes below this one."""
    return {child.pid for child in psutil.Process().children(recursive=True) if "EngineCore" in child.name()}


def test_a_server_that_has_answered_is_ready(server: Server) -> None:
    server.chat([image_url()])
    server.chat([], "what is this ?")
    response = until(lambda response: response.json()["integrity"]["checks"] > 0, server.http)
    assert response.status_code == 200, response.text
    integrity = response.json()["integrity"]
    assert response.json()["ready"] is True
    assert integrity["checks"] > 0
    assert (integrity["failed_checks"], integrity["findings"]) == (0, [])


def test_a_leak_makes_the_server_unready_and_so_does_the_engines_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "1")
    others = cores()
    with (
        local_server(["--enforce-eager"], on_wait=lambda: None, command=COMMAND) as url,
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        assert http.get("/ready").json() == {
            "ready": True,
            "integrity": {"checks": 0, "failed_checks": 0, "findings": []},
        }
        model = http.get("/v1/models").json()["data"][0]["id"]
        body = {"model": model, "messages": [user([image_url()], QUESTION)], "max_tokens": 3}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        assert until(lambda response: response.json()["integrity"]["checks"] == 1, http).status_code == 200

        leaking = http.post("/v1/chat/completions", json=body | {"max_tokens": LEAK_TOKENS})
        assert leaking.status_code == 200
        unready = until(lambda response: response.status_code == 503, http)
        assert unready.status_code == 503
        found = unready.json()
        assert found["ready"] is False
        assert "integrity" in found["reason"]
        (finding,) = found["integrity"]["findings"]
        assert "stands in 0 tables and 0 times in the free list" in finding
        assert http.get("/health").status_code == 200, "it lives"
        assert http.post("/v1/chat/completions", json=body).status_code == 200, "it still answers"

        (core,) = cores() - others  # other tests' servers live on
        os.kill(core, signal.SIGKILL)
        dead = until(lambda response: "EngineCore" in response.text, http)
        assert dead.status_code == 503
        assert "EngineCore" in dead.json()["reason"]
        assert http.get("/health").status_code == 503, "nor does it live"
        process = api_process(url)
        process.terminate()
        assert exit_code(process) == 1, "the exit code tells a supervisor that it was not a requested stop"


def test_a_killed_engine_ends_the_server_and_its_clients_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default, and in the midst of an answer; nothing else tells the server to end."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    others = cores()
    with (
        local_server(["--enforce-eager"], on_wait=lambda: None) as url,
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        process = api_process(url)
        children = process.children(recursive=True)
        body = {"model": "hidrop-embedded", "messages": [user([image_url()], QUESTION)], "max_tokens": 3000}
        body |= {"stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            (core,) = cores() - others
            os.kill(core, signal.SIGKILL)
            *_, error, done = [line for line in lines if line]
        assert (json.loads(error.removeprefix("data: "))["error"]["code"], done) == (500, "data: [DONE]")
        assert exit_code(process) == 1
        assert not left(children), "they notice by themselves"


def test_a_killed_server_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle, which is when an engine waits for requests only."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with local_server(["--enforce-eager"], on_wait=lambda: None) as url:
        process = api_process(url)
        children = process.children(recursive=True)
        assert any("EngineCore" in child.name() for child in children)
        process.kill()
        assert not left(children)
