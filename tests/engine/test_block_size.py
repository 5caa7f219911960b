"""Plans are counted in the blocks that there are, whoever chose their size and when."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform

from tests.engine.harness import Ask, engine, prompt
from vllm_hidrop.engine.kv_cache import StageSpec, block_size_of
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

HIDROP = {"method": "hidrop", "preset": "tok48", "options": {"scale": True}}


def test_a_size_that_a_backend_chooses_late_is_everybodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA's backends may, after the worker has been set up."""
    choose = current_platform.update_block_size_for_backend

    def chosen_late(vllm_config: Any) -> None:
        choose(vllm_config)
        vllm_config.cache_config.block_size = 64

    monkeypatch.setattr(type(current_platform), "update_block_size_for_backend", staticmethod(chosen_late))
    rng = np.random.default_rng(0)
    start = prompt(rng, "9" * 12)  # 109 tokens: one block of 64, or three of 32
    asks = [Ask(start + prompt(rng, "i9")[1:], (1,)), Ask(start + prompt(rng, "i5")[1:], (1,))]
    with engine(make_llava(tmp_path, "mistral"), HIDROP) as running:
        assert running.scheduler.block_size == 64
        assert running.scheduler.planner.block_size == running.runner.planner.block_size == 64
        cold = [running.ask([ask])[0] for ask in asks]
        assert running.llm.reset_prefix_cache()
        for ask, answer in zip(asks[::-1], cold[::-1], strict=True):
            assert running.ask([ask])[0].token_ids == answer.token_ids
        assert cold[1].cached_tokens == 109 + 64, "the prompt starts behind the image"


def test_groups_of_several_sizes_are_refused() -> None:
    shape: dict[str, Any] = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32, "stage": 0}
    specs = [StageSpec(block_size=size, **shape) for size in (32, 64, 32)]
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    with pytest.raises(ValueError, match=r"\[32, 64\]: set --block-size"):
        block_size_of(SimpleNamespace(kv_cache_groups=groups))
    assert block_size_of(SimpleNamespace(kv_cache_groups=groups[:1])) == 32
