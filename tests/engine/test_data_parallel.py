"""`--data-parallel-size 2`: either engine answers as one alone does, is counted under its own label, and is watched."""

import io
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI
from PIL import Image
from vllm import SamplingParams

from tests.engine.harness import engine
from tests.server.harness import QUESTION, Server, data_url, picture
from tests.server.processes import exit_code, left
from tests.server.test_metrics import SUMS
from vllm_hidrop.cli.local_server import local_server
from vllm_hidrop.embedded import MODEL_DIR

pytestmark = pytest.mark.server

RANKS = (0, 1)
ASKS: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((1,), {}),
    ((1,), {"hidrop": "off"}),
    ((2, 3), {}),
    ((), {}),
)
"""Seeds of the pictures of each request, and its options."""
ANSWER: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
Ended = tuple[list[int], dict[str, Any]]
"""Token ids and report of an answer."""


@pytest.fixture(scope="module")
def alone() -> list[Ended]:
    """What one engine answers."""
    with engine(MODEL_DIR, {}, max_model_len=4096, max_logprobs=1, limit_mm_per_prompt={"image": 4}) as running:
        found = []
        for seeds, options in ASKS:
            images = [Image.open(io.BytesIO(picture(seed))) for seed in seeds]
            parts: list[dict[str, Any]] = [{"type": "image_pil", "image_pil": image} for image in images]
            message = {"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}
            params = SamplingParams(temperature=0, extra_args=dict(options), **ANSWER)
            (output,) = running.llm.chat([message], params, use_tqdm=False)
            found.append((list(output.outputs[0].token_ids), output.kv_transfer_params["hidrop"]))
        return found


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)], ids="{} API processes".format, scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Server, psutil.Process]]:
    """A server with two engines, and its first process."""
    flags = ("--data-parallel-size", "2", "--api-server-count", str(request.param), "--enforce-eager")
    others = set(psutil.Process().children())
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # for the server's process only
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            url = stack.enter_context(local_server(flags, on_wait=lambda: None))
        (launcher,) = (child for child in set(psutil.Process().children()) - others if "tracker" not in child.name())
        http = stack.enter_context(httpx.Client(base_url=url, timeout=120))
        yield Server(url, http, stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none"))), launcher


def ask(server: Server, seeds: tuple[int, ...], options: dict[str, Any], rank: int | None = None) -> Ended:
    """Ask the engine of a rank, or any."""
    body = server.body([data_url(picture(seed)) for seed in seeds], vllm_xargs=options, return_token_ids=True, **ANSWER)
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    response = server.http.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["token_ids"], answer["hidrop"]


def test_two_engines_answer_and_count_as_one_does(alone: list[Ended], pair: tuple[Server, psutil.Process]) -> None:
    server, _ = pair
    before = Counter(server.metrics())
    reports: list[dict[str, Any]] = []
    unlike = {"selection_ms": 0, "engine": 0}
    for (seeds, options), (token_ids, report) in zip(ASKS, alone, strict=True):
        for rank in RANKS:
            found, told = ask(server, seeds, options, rank)
            assert found == token_ids
            assert told["engine"] == rank
            assert told | unlike == report | unlike
            reports.append(told)
    with ThreadPoolExecutor(6) as threads:
        at_once = list(threads.map(lambda number: ask(server, *ASKS[number % 3]), range(6)))
    for number, (found, told) in enumerate(at_once):
        assert found == alone[number % 3][0]
        reports.append(told)
    assert {told["engine"] for _, told in at_once} == set(RANKS), "a burst goes to both"
    grown = Counter(server.metrics())
    grown.subtract(before)
    for rank in RANKS:
        of_rank = [report for report in reports if report["engine"] == rank]

        def growth(name: str, **labels: str) -> float:
            wanted = labels.items()
            return sum(
                value for (found, have), value in grown.items() if found == name and wanted <= dict(have).items()
            )

        for name, field in SUMS.items():
            assert growth(name, engine=str(rank)) == sum(report[field] for report in of_rank), name
        for mode in ("pruned", "off", "text"):
            expected = sum(report["mode"] == mode for report in of_rank)
            assert growth("vllm_hidrop_requests_total", engine=str(rank), mode=mode) == expected
        assert growth("vllm:request_success_total", engine=str(rank)) == len(of_rank)
        assert server.metric("vllm_hidrop_plan_info", engine=str(rank)) == 1


def test_a_client_that_leaves_frees_the_engine_that_ran_it(pair: tuple[Server, psutil.Process]) -> None:
    server, _ = pair
    aborted = server.metric("vllm_hidrop_requests_total", mode="aborted", engine="1")
    body = server.body([data_url(picture(4))], stream=True, max_tokens=3000, ignore_eos=True)
    headers = {"X-data-parallel-rank": "1"}
    with server.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        lines = response.iter_lines()
        next(lines)
    deadline = time.monotonic() + 30
    while server.metric("vllm_hidrop_requests_total", mode="aborted", engine="1") == aborted:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.metric("vllm_hidrop_requests_total", mode="aborted", engine="1") == aborted + 1
    for rank in RANKS:
        ask(server, (), {}, rank)  # the gauge is of the last step
        assert server.metric("vllm:kv_cache_usage_perc", engine=str(rank)) == 0
    ready = server.http.get("/ready")
    assert ready.status_code == 200, ready.text
    assert ready.json()["integrity"]["checks"] >= len(RANKS)
    assert ready.json()["integrity"]["findings"] == []


def test_the_death_of_one_engine_ends_the_server(pair: tuple[Server, psutil.Process]) -> None:
    """The last test of this server."""
    _, launcher = pair
    processes = launcher.children(recursive=True)
    (victim,) = (process for process in processes if "EngineCore_DP1" in process.name())
    os.kill(victim.pid, signal.SIGKILL)
    assert exit_code(launcher) == 1
    assert not left(processes)
