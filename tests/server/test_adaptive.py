"""The embedded model under the methods that decide their own counts: true counts in the response and in /metrics."""

from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from openai import OpenAI

from tests.server.harness import Server, check_report, image_url, kept
from vllm_hidrop.cli.local_server import local_server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=["visipruner", "mustdrop"])
def adaptive(request: pytest.FixtureRequest) -> Iterator[Server]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            url = stack.enter_context(
                local_server(["--method", request.param, "--enforce-eager"], on_wait=lambda: None)
            )
        http = stack.enter_context(httpx.Client(base_url=url, timeout=120))
        client = stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120))
        yield Server(url, http, client)


def test_true_counts_stand_in_the_response_and_in_the_metrics(adaptive: Server) -> None:
    answers = [adaptive.chat([image_url(seed)], ignore_eos=True) for seed in range(4)]
    answers.append(adaptive.chat([image_url(1), image_url(2)]))
    reports = [answer["hidrop"] for answer in answers]
    for answer in answers:
        check_report(answer["hidrop"], answer, adaptive.schedule)
        assert kept(answer["hidrop"]) == sorted(kept(answer["hidrop"]), reverse=True)
    assert len({tuple(kept(report)) for report in reports}) > 1, "every request kept the same"
    for index in range(len(adaptive.schedule.stages)):
        for what in ("kept", "cached"):
            total = sum(report["stages"][index][what] for report in reports)
            assert adaptive.metric(f"vllm_hidrop_vision_tokens_{what}_total", stage=str(index)) == total
    returned = sum(report["kv_blocks_returned"] for report in reports)
    assert adaptive.metric("vllm_hidrop_kv_blocks_returned_total") == returned > 0
    for name in ("cut_layer", "exit_layer"):
        layers = [report[name] for report in reports if report[name] is not None]
        assert adaptive.metric(f"vllm_hidrop_{name}_count") == len(layers)
        assert adaptive.metric(f"vllm_hidrop_{name}_sum") == sum(layers)


def test_off_is_dense_and_wishes_it_cannot_honour_are_a_400(adaptive: Server) -> None:
    report = adaptive.chat([image_url(1)], vllm_xargs={"hidrop": "off"})["hidrop"]
    assert report["mode"] == "off"
    assert set(kept(report)) == {576}
    assert report["kv_blocks_returned"] == 0
    for wish in ({"hidrop_keep": [1]}, {"hidrop_method": "nonsense"}):
        body = adaptive.body([image_url(1)], vllm_xargs=wish)
        response = adaptive.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert next(iter(wish)).removeprefix("hidrop_") in response.text or "cannot run" in response.text
    description = adaptive.http.get("/hidrop").json()
    assert description["keeps_are_bounds"]
    for name in description["request_methods"]:
        assert adaptive.chat([image_url(1)], vllm_xargs={"hidrop_method": name})["hidrop"]["method"] == name


def test_no_block_is_left_taken(adaptive: Server) -> None:
    adaptive.chat([])
    assert adaptive.metric("vllm:kv_cache_usage_perc") == 0
