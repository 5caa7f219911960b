"""KV bytes and FLOPs in the response are those that `hidrop plan` computes for the request, from another source."""

from dataclasses import replace

import pytest

from tests.server.harness import IMAGE_TOKENS, Server, image_url
from vllm_hidrop.cli.costing import Workload, read_model, request_costs
from vllm_hidrop.cli.media import image
from vllm_hidrop.config import HidropConfig, Resolved, resolve
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.plan.costs import RequestCosts

pytestmark = pytest.mark.server

BLOCK_SIZE = 32
FLOAT32 = 4
METHODS = [None, "fastv", "uniform"]
"""The server's own, and those that its stages can express."""


def planned(text_tokens: int, num_images: int, method: str | None = None) -> RequestCosts:
    model = read_model("embedded")
    model = replace(model, text=replace(model.text, kv_bytes_per_element=FLOAT32))
    shape = ModelShape(model.text.num_layers, IMAGE_TOKENS)
    own = resolve(HidropConfig.parse({}), shape, model.trained)
    resolved: Resolved = own
    if method is not None:  # at its default, over the server's own stages
        other = resolve(HidropConfig.parse({"method": method, "force": True}), shape, model.trained)
        keeps = [other.schedule.stages[other.schedule.stage_of_layer(s.first_layer)].keep for s in own.schedule.stages]
        resolved = replace(other, schedule=own.schedule.with_keeps([keep.dump() for keep in keeps]))
    return request_costs(model, resolved, Workload((image(IMAGE_TOKENS),) * num_images, text_tokens, BLOCK_SIZE))


@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_cold_prompt_costs_what_planning_says(server: Server, method: str | None, num_images: int) -> None:
    first_seed = 1000 * num_images + 10 * METHODS.index(method)  # of images that no other test sends
    wish = {"hidrop_method": method} if method else {}
    images = [image_url(first_seed + number) for number in range(num_images)]
    report = server.chat(images, max_tokens=1, vllm_xargs=wish, cache_salt=f"{method} {num_images}")["hidrop"]
    assert (report["reused_tokens"], report["encoded_images"]) == (0, num_images)
    costs = planned(report["prompt_tokens"] - report["vision_tokens"], num_images, method)
    assert (report["kv_blocks"], report["kv_bytes"]) == (costs.kv_blocks, costs.kv_bytes)
    assert report["kv_bytes_dense"] == costs.dense_kv_bytes
    assert costs.encoder_flops is not None
    assert report["prefill_flops"] == costs.flops + costs.encoder_flops
    assert report["prefill_flops_dense"] == costs.dense_flops + costs.encoder_flops


def test_off_saves_nothing_but_what_is_cached(server: Server) -> None:
    off = {"hidrop": "off"}
    cold = server.chat([image_url(7001)], vllm_xargs=off, max_tokens=1, cache_salt="off")["hidrop"]
    assert cold["prefill_flops"] == cold["prefill_flops_dense"]
    again = server.chat([image_url(7001)], vllm_xargs=off, max_tokens=1, cache_salt="another")["hidrop"]
    tower = planned(1, 1).encoder_flops
    assert again["encoded_images"] == 0, "its features are in the encoder's cache"
    assert again["prefill_flops"] == again["prefill_flops_dense"] - (tower or 0)
    reused = server.chat([image_url(7001)], vllm_xargs=off, max_tokens=1, cache_salt="off")["hidrop"]
    assert reused["reused_tokens"] > IMAGE_TOKENS - BLOCK_SIZE
    assert reused["prefill_flops"] < again["prefill_flops"] / 5
    assert reused["prefill_flops_dense"] == cold["prefill_flops_dense"]
    assert reused["kv_bytes"] == cold["kv_bytes"]


def test_a_text_prompt_has_no_tower(server: Server) -> None:
    report = server.chat([], max_tokens=1, cache_salt="text")["hidrop"]
    assert report["prefill_flops"] == report["prefill_flops_dense"]
    text = planned(report["prompt_tokens"], 0)
    assert report["prefill_flops"] == text.flops
