"""A prompt that started behind a cached image runs again when that image's KV and features are gone."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from tests.engine.harness import Ask, engine, prompt
from tests.engine.test_adaptive_blocks import CHOICES as ADAPTIVE
from tests.engine.test_blocks import HIDROP, count_preemptions
from tests.engine.traffic import Traffic, Wanted, alone
from tests.tiny_models import IMAGE_TOKEN, TOKENS_PER_IMAGE, make_llava

pytestmark = pytest.mark.engine

SERVERS: dict[str, tuple[dict[str, Any], int]] = {  # and the blocks of their pools
    "hidrop": (HIDROP, 90),
    "fastv": ({"method": "fastv"}, 40),
    "mustdrop": (ADAPTIVE["mustdrop"], 80),
}
LIMITS = {"max_model_len": 256, "max_num_batched_tokens": 256}
"""The encoder's cache then holds four images."""


def wanted() -> list[Wanted]:
    """Conversations about four images: prompts that begin alike, pruned and not."""
    rng = np.random.default_rng(4)
    found = []
    for seed in range(4):
        start = (*prompt(rng, "3"), IMAGE_TOKEN)
        for turn, wish in enumerate(({}, {"hidrop": "off"}, {}, {"hidrop": "off"})):
            tokens = (*start, *prompt(rng, "9" * (1 + turn))[1:])
            found.append(Wanted(Ask(tokens, (seed,), wish, max_tokens=40)))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("name", SERVERS)
def test_a_small_pool_and_a_small_encoder_cache_under_reuse_preemption_and_aborts(model: Path, name: str) -> None:
    choice, num_blocks = SERVERS[name]
    kinds = wanted()
    with engine(model, choice, num_gpu_blocks_override=num_blocks, **LIMITS) as running:
        expected = alone(running, kinds)
        preempted = count_preemptions(running)
        again: list[int] = []
        behind: list[int] = []
        running.scheduler.encoder_cache_manager = EncoderCacheManager(TOKENS_PER_IMAGE)
        scheduled = running.scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = scheduled(*args, **kwargs)
            again.extend(len(images) for images in output.images_again.values())
            behind.extend(len(running.scheduler.withheld.get(new.req_id, ())) for new in output.scheduled_new_reqs)
            return output

        running.scheduler.schedule = schedule
        finished = Traffic(running, kinds, random.Random(name), busy=8).run(150, abort_share=0.02)
        print("preempted", len(preempted), "again", len(again), "behind", sum(behind), "of", len(behind))
        assert preempted, "the pool was large enough: nothing was tested"
        assert again, "no image was encoded that a prompt had been admitted behind"
    wrong = {key: which for key, (which, answered) in finished.items() if answered != expected[which]}
    assert not wrong, f"{len(wrong)} of {len(finished)}: {wrong}"
