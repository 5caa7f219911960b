"""A prompt that started behind a cached image runs again when that image's KV and features are gone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from tests.engine.harness import Ask, Engine, engine, prompt
from tests.engine.test_blocks import HIDROP, count_preemptions
from tests.engine.traffic import Traffic, Wanted, alone
from vllm_hidrop.verify.tiny_models import IMAGE_TOKEN, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

SERVERS: dict[str, tuple[dict[str, Any], int]] = {  # and the blocks of their pools
    "hidrop": (HIDROP, 170),
    "fastv": ({"method": "fastv"}, 72),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


def question(rng: np.random.Generator) -> tuple[int, ...]:
    """Three blocks of 32, which end behind the image: unpruned requests reuse whole blocks."""
    return (*prompt(rng, "3"), IMAGE_TOKEN, *prompt(rng, "9991")[1:])


@contextmanager
def counting(running: Engine) -> Iterator[list[int]]:
    """How many pixels came again in every step."""
    again: list[int] = []
    schedule = running.scheduler.schedule

    def counted(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        again.extend(len(images) for images in output.images_again.values())
        return output

    running.scheduler.schedule = counted
    try:
        yield again
    finally:
        del running.scheduler.schedule


@pytest.mark.parametrize("wish", [{}, {"hidrop": "off"}], ids=["pruned", "off"])
@pytest.mark.parametrize("name", SERVERS)
def test_an_image_comes_again_with_the_step_that_needs_it(model: Path, name: str, wish: dict[str, str]) -> None:
    rng = np.random.default_rng(2)
    start = question(rng)
    first, later = (Ask((*start, *prompt(rng, "9")[1:]), (1,), wish, max_tokens=20) for _ in range(2))
    with engine(model, SERVERS[name][0]) as running:
        alone = running.ask([later])[0]
        assert running.llm.reset_prefix_cache()
        running.scheduler.encoder_cache_manager = EncoderCacheManager(TOKENS_PER_IMAGE)
        running.ask([first])
        running.add("behind", later)
        running.step()
        assert any(record.withheld for record in running.scheduler.records.values()), (
            "it did not start behind the image"
        )
        running.add("another image", Ask(prompt(rng, "i9"), (2,), wish, max_tokens=2))
        running.step()
        with counting(running) as again:
            running.llm.reset_prefix_cache(reset_running_requests=True)  # preempts them
            outputs: dict[str, Any] = {}
            while running.scheduler.requests:
                outputs |= {output.request_id: output for output in running.step()}
        assert again == [1]
        (answer,) = (each for key, each in outputs.items() if key.startswith("behind"))
        assert list(answer.outputs[0].token_ids) == alone.token_ids
        running.check_pool_is_whole()


def wanted() -> list[Wanted]:
    """Questions about six images, pruned and not, and long texts that take the pool from them."""
    rng = np.random.default_rng(4)
    found = []
    for seed in range(6):
        start = question(rng)
        for wish in ({}, {"hidrop": "off"}) * 2:
            found.append(Wanted(Ask((*start, *prompt(rng, "9")[1:]), (seed,), wish, max_tokens=30)))
        found.append(Wanted(Ask(prompt(rng, "9"), max_tokens=100)))
    return found


@pytest.mark.parametrize("name", SERVERS)
def test_a_small_pool_and_a_small_encoder_cache_under_reuse_preemption_and_aborts(model: Path, name: str) -> None:
    choice, num_blocks = SERVERS[name]
    kinds = wanted()
    limits = {"num_gpu_blocks_override": num_blocks, "max_model_len": 256, "max_num_batched_tokens": 256}
    with engine(model, choice, **limits) as running:
        running.scheduler.encoder_cache_manager = EncoderCacheManager(TOKENS_PER_IMAGE)
        expected = alone(running, kinds)
        preempted = count_preemptions(running)
        with counting(running) as again:
            finished = Traffic(running, kinds, random.Random(1), busy=8).run(130, abort_share=0.02)
        assert preempted, "the pool was large enough: nothing was tested"
        assert again, "no prompt had to run again without its image"
    wrong = {key: which for key, (which, answered) in finished.items() if answered != expected[which]}
    assert not wrong, f"{len(wrong)} of {len(finished)}: {wrong}"
