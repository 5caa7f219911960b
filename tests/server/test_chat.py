"""Answers and reports, as an OpenAI client sees them."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.harness import (
    IMAGE_TOKENS,
    QUESTION,
    Server,
    check_report,
    content,
    image_url,
    kept,
    user,
)

pytestmark = pytest.mark.server


def test_a_pruned_answer_reports_what_the_schedule_promised(server: Server) -> None:
    answer = server.openai.chat.completions.create(**server.body([image_url()])).model_dump()
    report = answer["hidrop"]
    check_report(report, answer, server.schedule)
    assert report["mode"] == "pruned"
    assert report["vision_tokens"] == IMAGE_TOKENS
    assert kept(report) == list(server.schedule.kept(IMAGE_TOKENS))
    assert report["layer_tokens"] < report["layer_tokens_dense"]
    assert report["kv_blocks"] < report["kv_blocks_dense"]
    assert answer["kv_transfer_params"] is None


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_says_the_same_and_reports_once_at_its_end(server: Server, include_usage: bool) -> None:
    server.chat([image_url()])
    whole = server.chat([image_url()])  # its image is reused, and the stream's
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if include_usage else {}
    stream: Any = server.openai.chat.completions.create(**server.body([image_url()], stream=True, **options))
    chunks = [chunk.model_dump() for chunk in stream]
    text = "".join(choice["delta"]["content"] or "" for chunk in chunks for choice in chunk["choices"])
    assert text == content(whole)
    assert [bool(chunk.get("hidrop")) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    last = chunks[-1]
    assert last["hidrop"] | {"selection_ms": 0} == whole["hidrop"] | {"selection_ms": 0}  # a time is never the same
    if include_usage:
        assert last["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    else:
        assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_each_of_two_images_is_pruned(server: Server) -> None:
    answer = server.chat([image_url(1), image_url(2)])
    check_report(answer["hidrop"], answer, server.schedule)
    assert kept(answer["hidrop"]) == [2 * n for n in server.schedule.kept(IMAGE_TOKENS)]


def test_a_second_turn_still_sees_the_image_of_the_first(server: Server) -> None:
    turns = [
        user([image_url()], QUESTION),
        {"role": "assistant", "content": "red"},
        user([], "how many objects are there ?"),
    ]
    answer = server.chat([], messages=turns)
    check_report(answer["hidrop"], answer, server.schedule)
    assert answer["hidrop"]["mode"] == "pruned"
    assert kept(answer["hidrop"]) == list(server.schedule.kept(IMAGE_TOKENS))


def test_another_question_about_an_image_and_the_next_turn_reuse_it(server: Server) -> None:
    image, other = image_url(77), "how many objects are there ?"
    first = server.chat([image])
    assert first["hidrop"]["reused_tokens"] < IMAGE_TOKENS
    turns = [user([image], QUESTION), {"role": "assistant", "content": content(first)}, user([], other)]
    again = [server.chat([image], other), server.chat([], messages=turns), server.chat([image])]
    for answer in again:
        check_report(answer["hidrop"], answer, server.schedule)
        assert answer["hidrop"]["reused_tokens"] > IMAGE_TOKENS
        assert answer["hidrop"]["layer_tokens"] < first["hidrop"]["layer_tokens"]
    assert content(again[-1]) == content(first)


def test_text_is_not_pruned(server: Server) -> None:
    answer = server.chat([], "what is this ?")
    report = answer["hidrop"]
    check_report(report, answer, server.schedule)
    assert report["mode"] == "text"
    assert report["vision_tokens"] == 0
    assert report["layer_tokens"] == report["layer_tokens_dense"] - report["reused_tokens"] * server.schedule.num_layers


def test_off_keeps_everything_everywhere(server: Server) -> None:
    answer = server.chat([image_url()], vllm_xargs={"hidrop": "off"})
    report = answer["hidrop"]
    check_report(report, answer, server.schedule)
    assert report["mode"] == "off"
    assert set(kept(report)) == {IMAGE_TOKENS}
    assert report["kv_blocks"] == report["kv_blocks_dense"]
    assert report["layer_tokens"] == report["layer_tokens_dense"] - report["reused_tokens"] * server.schedule.num_layers


def test_keeps_of_the_request_win_over_the_servers(server: Server) -> None:
    num_stages = len(server.schedule.stages)
    wanted = ["all", 0.25, *[7] * (num_stages - 2)]
    answer = server.chat([image_url()], vllm_xargs={"hidrop_keep": wanted})
    check_report(answer["hidrop"], answer, server.schedule)
    assert kept(answer["hidrop"]) == [IMAGE_TOKENS, IMAGE_TOKENS // 4, *[7] * (num_stages - 2)]


def test_keeping_all_by_request_answers_like_off(server: Server) -> None:
    keep_all = {"hidrop_keep": ["all"] * len(server.schedule.stages)}
    more: dict[str, Any] = {"logprobs": True, "top_logprobs": 5}
    by_keep = server.chat([image_url(3)], vllm_xargs=keep_all, **more)
    off = server.chat([image_url(3)], vllm_xargs={"hidrop": "off"}, **more)
    assert by_keep["choices"][0]["message"] == off["choices"][0]["message"]
    pairs = zip(by_keep["choices"][0]["logprobs"]["content"], off["choices"][0]["logprobs"]["content"], strict=True)
    for one, other in pairs:
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


def mixed_requests(server: Server) -> list[dict[str, Any]]:
    """Sixteen requests of every kind."""
    num_stages = len(server.schedule.stages)
    wishes: list[dict[str, Any] | None] = [
        None,
        {"hidrop": "off"},
        {"hidrop_keep": ["all", 0.5, *[9] * (num_stages - 2)]},
        {"hidrop": "on"},
    ]
    bodies = []
    for i in range(16):
        images = [image_url(10 * i + j) for j in range((i // 4) % 3)]
        text = QUESTION if images else "how many objects are there ?"
        bodies.append(server.body(images, text, vllm_xargs=wishes[i % 4], max_tokens=4 + i % 5))
    return bodies


def test_concurrent_mixed_requests_answer_as_they_do_alone(server: Server) -> None:
    bodies = mixed_requests(server)

    def send(body: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        answer = server.openai.chat.completions.create(**with_extra(body)).model_dump()
        stages = [stage | {"reused": 0} for stage in answer["hidrop"]["stages"]]  # reused is what came before
        return content(answer), stages

    alone = [send(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(send, bodies))
    assert together == alone


def with_extra(body: dict[str, Any]) -> dict[str, Any]:
    """The body as the client's keyword arguments: what is not OpenAI's goes to ``extra_body``."""
    rest = {key: value for key, value in body.items() if key != "vllm_xargs"}
    return {**rest, "extra_body": {"vllm_xargs": body["vllm_xargs"]}}


def test_completions_report_too(server: Server) -> None:
    body: dict[str, Any] = {"model": server.model, "prompt": "what colour", "max_tokens": 3, "temperature": 0}
    whole = server.openai.completions.create(**body).model_dump()
    assert whole["hidrop"]["mode"] == "text"
    assert whole["kv_transfer_params"] is None
    chunks = [chunk.model_dump() for chunk in server.openai.completions.create(**body, stream=True)]
    assert chunks[-1]["hidrop"] == whole["hidrop"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]


def test_several_choices_share_one_report(server: Server) -> None:
    answer = server.chat([image_url()], n=2, temperature=1.0)
    assert len(answer["choices"]) == 2
    assert kept(answer["hidrop"]) == list(server.schedule.kept(IMAGE_TOKENS))


def test_the_model_list_and_hidrop_describe_the_schedule(server: Server) -> None:
    (card,) = server.http.get("/v1/models").json()["data"]
    description = server.http.get("/hidrop").json()
    fields = {"method", "preset", "positions", "schedule", "stages", "keeps_are_bounds", "request_methods"}
    fields |= {"prefix_state_bytes", "modalities", "pictures"}
    assert card["hidrop"].keys() == fields
    assert card["hidrop"].items() <= description.items()
    assert (card["hidrop"]["method"], card["hidrop"]["preset"]) == ("hidrop", "embedded")
    assert (card["hidrop"]["modalities"], card["hidrop"]["pictures"]) == (["image"], "squares")
    assert [stage["end_layer"] for stage in card["hidrop"]["stages"]] == list(server.schedule.end_layers)
    assert set(description["request_options"]) == {"hidrop", "hidrop_keep", "hidrop_method", "hidrop_explain"}


def test_health_answers(server: Server) -> None:
    assert server.http.get("/health").status_code == 200
