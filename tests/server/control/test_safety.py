"""A server with keys and bounds: who may ask, what is fetched, what takes too long, and how it ends."""

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.server.harness import Server, image_url
from tests.server.media.stranger import stranger
from tests.server.processes import api_process, exit_code, left, log_file
from vllm_hidrop.cli.local_server import local_server

pytestmark = pytest.mark.server

KEY, METRICS_KEY, WRONG_KEY = "sk-the-api-key", "the-metrics-key", "sk-a-wrong-key"
QUEUE = 16
DEADLINE_SECONDS = 12
"""16 answers of 3,000 tokens take much longer."""
DRAIN_SECONDS = 6
"""They take longer than this, too, and one of 40 tokens does not."""
FLAGS = (
    *("--api-key", KEY, "--metrics-api-key", METRICS_KEY),
    *("--allowed-media-domains", "localhost", "127.0.0.2", "--allowed-media-networks", "127.0.0.1/32", "::1/128"),
    *("--request-timeout", str(DEADLINE_SECONDS), "--shutdown-timeout", str(DRAIN_SECONDS)),
    *("--uvicorn-log-level", "debug", "--enable-log-requests", "--enforce-eager"),
    *("--max-num-queued-reqs", str(QUEUE), "--max-num-seqs", str(QUEUE)),
)
LONG: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True, "temperature": 1}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:  # for the server's process only
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
        with (
            local_server(FLAGS, on_wait=lambda: None) as url,
            httpx.Client(base_url=url, timeout=120, headers={"Authorization": f"Bearer {KEY}"}) as http,
            OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client,
        ):
            yield Server(url, http, client, KEY, {"Authorization": f"Bearer {METRICS_KEY}"})


def until_idle(guarded: Server) -> None:
    deadline = time.monotonic() + 60
    while guarded.metric("vllm:num_requests_running") > 0:
        assert time.monotonic() < deadline, "the request runs on"
        time.sleep(0.1)
    guarded.chat([])  # the gauge is of the last step
    assert guarded.metric("vllm:kv_cache_usage_perc") == 0
    assert guarded.http.get("/ready").status_code == 200


def test_every_route_but_the_open_ones_needs_the_key(guarded: Server) -> None:
    document = guarded.http.get("/openapi.json").json()
    open_paths = set()
    for path, operations in document["paths"].items():
        for method in operations:
            if httpx.request(method, f"{guarded.url}{path}").status_code != 401:
                open_paths.add(path)
    assert open_paths == {"/health", "/ready"}
    assert KEY not in httpx.get(f"{guarded.url}/playground").raise_for_status().text, "not in the document, and open"
    for path in ("/docs", "/redoc", "/openapi.json", "/metrics", "/metrics/", "/invocations"):
        assert httpx.get(f"{guarded.url}{path}").status_code == 401, path


def test_clients_with_the_key_are_served(guarded: Server) -> None:
    assert guarded.openai.models.list().data
    body = {"model": guarded.model, "max_tokens": 2, "messages": [{"role": "user", "content": "what is this ?"}]}
    headers = {"X-Api-Key": KEY, "anthropic-version": "2023-06-01"}
    response = httpx.post(f"{guarded.url}/v1/messages", json=body, headers=headers, timeout=120)
    assert response.status_code == 200, response.text


def test_metrics_have_a_key_of_their_own(guarded: Server) -> None:
    assert guarded.http.get("/metrics").status_code == 401
    before = guarded.metric("vllm_hidrop_refused_requests_total", reason="key")
    assert httpx.get(f"{guarded.url}/v1/models", headers={"Authorization": f"Bearer {METRICS_KEY}"}).status_code == 401
    assert guarded.metric("vllm_hidrop_refused_requests_total", reason="key") == before + 1


@pytest.mark.parametrize(
    "path",
    ["/invocations", "/ping", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/abort_requests", "/sleep"],
)
def test_an_administrators_route_is_not_there(guarded: Server, path: str) -> None:
    assert guarded.http.post(path, json={}).status_code == 404
    assert path not in guarded.http.get("/openapi.json").json()["paths"]


def test_browsers_of_other_origins_are_not_let_in(guarded: Server) -> None:
    origin = {"Origin": "https://elsewhere.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answers = [
        httpx.options(f"{guarded.url}/v1/chat/completions", headers=preflight),
        guarded.http.get("/v1/models", headers=origin),
    ]
    assert answers[0].status_code == 400
    for answer in answers:
        assert "access-control-allow-origin" not in answer.headers


def test_media_of_an_allowed_domain_is_fetched_and_nothing_of_elsewhere(guarded: Server) -> None:
    with stranger() as files:
        here = f"http://localhost:{files.port}"
        fetched = guarded.chat([f"{here}/picture"])
        assert fetched["choices"] == guarded.chat([image_url()])["choices"]
        refused = {
            "not public": f"{here}/to/http://127.0.0.2@/picture",
            "--allowed-media-domains": f"{here}/to/http://127.0.0.1@/picture",
            "http and https": f"{here}/to/file:///etc/passwd",
            "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": f"{here}/large",
            "404": f"{here}/nothing",
        }
        for says, url in refused.items():
            response = guarded.http.post("/v1/chat/completions", json=guarded.body([url]))
            assert response.status_code == 400, response.text
            assert says in response.json()["error"]["message"]
        assert all(asked.startswith("localhost/") for asked in files.seen), "nobody else was asked"


def test_a_full_queue_is_a_503_and_a_request_over_its_time_a_504(guarded: Server) -> None:
    aborted = guarded.metric("vllm_hidrop_requests_total", mode="aborted")
    body = guarded.body([image_url()], n=QUEUE, **LONG)
    with ThreadPoolExecutor() as threads:
        late = threads.submit(guarded.http.post, "/v1/chat/completions", json=body)
        while guarded.metric("vllm:num_requests_running") < QUEUE and not late.done():
            time.sleep(0.05)
        full = guarded.http.post("/v1/chat/completions", json=guarded.body([]))
        assert full.status_code == 503, full.text
        assert full.headers["Retry-After"] == "1"
        answer = late.result()
    assert answer.status_code == 504, answer.text[:500]
    assert "--request-timeout" in answer.json()["error"]["message"]
    until_idle(guarded)
    assert guarded.metric("vllm_hidrop_requests_total", mode="aborted") > aborted


def test_a_stream_over_its_time_ends_with_an_error_event(guarded: Server) -> None:
    body = guarded.body([image_url()], n=QUEUE, stream=True, **LONG)
    with guarded.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == 504
    assert lines[-1] == "data: [DONE]"
    until_idle(guarded)


def in_stream(lines: Iterator[str]) -> list[dict[str, Any]]:
    """What comes until the stream ends, without the last line, which says that it does."""
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def status_of(path: str, guarded: Server, key: str = KEY) -> int:
    return httpx.get(f"{guarded.url}{path}", headers={"Authorization": f"Bearer {key}"}, timeout=60).status_code


def test_a_server_told_to_stop_ends_all_it_has_begun_and_has_said_no_secret(guarded: Server) -> None:
    """The last test of this server."""
    process = api_process(guarded.url)
    log = log_file(process)
    children = process.children(recursive=True)
    assert status_of("/v1/models", guarded, WRONG_KEY) == 401
    body = guarded.body([image_url()], stream=True, stream_options={"include_usage": True}, ignore_eos=True)
    with (
        guarded.http.stream("POST", "/v1/chat/completions", json=body | LONG | {"n": QUEUE - 1}) as endless,
        guarded.http.stream("POST", "/v1/chat/completions", json=body | {"max_tokens": 40}) as short,
    ):
        of_endless, of_short = endless.iter_lines(), short.iter_lines()
        next(of_endless), next(of_short)
        process.send_signal(signal.SIGTERM)
        while status_of("/ready", guarded) != 503:
            time.sleep(0.05)
        assert status_of("/health", guarded) == 200, "it lives"
        assert status_of("/metrics", guarded, METRICS_KEY) == 200
        turned_away = guarded.http.post("/v1/chat/completions", json=body)
        assert (turned_away.status_code, turned_away.headers["Retry-After"]) == (503, "1")
        assert in_stream(of_short)[-1]["usage"]["completion_tokens"] == 40
        assert in_stream(of_endless)[-1]["error"]["code"] == 503
    assert exit_code(process) == 0
    assert not left(children)
    said = log.read_text(encoding="utf-8", errors="replace")
    assert "DEBUG" in said
    assert "Shutting down" in said
    assert not [secret for secret in (KEY, METRICS_KEY, WRONG_KEY) if secret in said]
