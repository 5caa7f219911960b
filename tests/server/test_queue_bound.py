"""What one request asks for at once is held against the queue's bound, and beams are sequences, too."""

from typing import Any

import pytest

from tests.server.harness import Server, content, image_url

pytestmark = pytest.mark.server

MESSAGE = {"role": "user", "content": "what ?"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [MESSAGE], "n": 1025, "temperature": 1}),
        ("/v1/chat/completions", {"messages": [MESSAGE], "n": 1025, "use_beam_search": True}),
        ("/v1/chat/completions", {"messages": [MESSAGE], "n": 1025, "temperature": 1, "stream": True}),
        ("/v1/chat/completions/batch", {"messages": [[MESSAGE]] * 1100}),
        ("/v1/completions", {"prompt": "what", "n": 2000, "temperature": 1}),
        ("/v1/completions", {"prompt": ["what"] * 600, "n": 2, "temperature": 1}),
        ("/v1/completions", {"prompt": [[1, 2]] * 600, "n": 2, "temperature": 1}),
        ("/generative_scoring", {"query": "what", "items": ["red"] * 1025, "label_token_ids": [1]}),
    ],
)
def test_what_never_fits_the_queue_is_a_400(server: Server, path: str, body: dict[str, Any]) -> None:
    response = server.http.post(path, json={"model": server.model, "max_tokens": 1, **body})
    assert response.status_code == 400, response.text[:300]
    assert "(--max-num-queued-reqs)" in response.json()["error"]["message"]


def test_a_batch_that_fits_is_answered(server: Server) -> None:
    body = {"model": server.model, "max_tokens": 1, "messages": [[MESSAGE]] * 70}
    response = server.http.post("/v1/chat/completions/batch", json=body)
    assert response.status_code == 200, response.text[:300]
    assert len(response.json()["choices"]) == 70


BEAMS: dict[str, Any] = {"use_beam_search": True, "n": 1, "max_tokens": 5, "ignore_eos": True}
DENSE: dict[str, Any] = {"vllm_xargs": {"hidrop": "off"}}


def test_beam_search_is_served_where_nothing_is_pruned(server: Server) -> None:
    """One beam is greedy decoding, so it must come to the same; two beams to something no less likely."""
    greedy = server.chat([image_url()], max_tokens=5, ignore_eos=True, **DENSE)
    beam = server.chat([image_url()], **BEAMS, **DENSE)
    assert content(beam).strip() == content(greedy).strip()
    two = server.chat([image_url()], **{**BEAMS, "n": 2}, **DENSE)
    assert len(two["choices"]) == 2
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_beam_search_that_would_be_pruned_says_how_to_ask(server: Server) -> None:
    response = server.http.post("/v1/chat/completions", json=server.body([image_url()], **BEAMS))
    assert response.status_code == 400
    assert 'vllm_xargs {"hidrop": "off"}' in response.json()["error"]["message"]


def test_beam_search_does_not_lose_a_bad_option(server: Server) -> None:
    body = server.body([], **BEAMS, vllm_xargs={"hidrop_kep": [1]})
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "known: hidrop" in response.json()["error"]["message"]
