"""The vision tower by vLLM's CPU kernel: the same features, and only for requests that are pruned."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.harness import Ask, engine, prompt
from vllm_hidrop.runners.tower_attention import KERNEL, TowerKernel
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine
CHOICE = {"method": "fastv", "options": {"layer": 2, "keep": 4}}


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_pruned_requests_get_the_kernels_features_and_others_stock_ones(tmp_path: Path, vision: str) -> None:
    """Three images at once by the kernel, the same three by PyTorch's attention: two entries each, 1e-5 apart."""
    model = make_llava(tmp_path, "llama", vision)
    tokens = prompt(np.random.default_rng(0), "3i2ii4")
    with engine(model, CHOICE) as running:
        kernel = running.runner.model.tower_kernel
        assert isinstance(kernel, TowerKernel)
        running.ask([Ask(tokens, (1, 2, 3))])
        assert kernel.pages is not None
        kernel.pages = None
        running.ask([Ask(tokens, (1, 2, 3), {"hidrop": "off"})])
        assert kernel.pages is None, "an unpruned request was encoded by the kernel"
        cached = running.runner.encoder_cache
        pruned = {name: features for name, features in cached.items() if name.endswith(f":{KERNEL}")}
        assert len(pruned) == 3
        assert len(cached) == 6
        for name, features in pruned.items():
            dense = cached[name.removesuffix(f":{KERNEL}")]
            assert torch.allclose(features, dense, atol=1e-5, rtol=1e-4)
            assert not torch.equal(features, dense)


def test_in_one_step_every_request_gets_the_features_it_gets_alone(tmp_path: Path) -> None:
    """A pruned and an unpruned request that start together: two runs of the tower, and the same bits as ever."""
    model = make_llava(tmp_path, "llama")
    tokens = prompt(np.random.default_rng(0), "3i4")
    asks = [Ask(tokens, (1,)), Ask(tokens, (2,), {"hidrop": "off"})]
    with engine(model, CHOICE) as running:
        for ask in asks:
            running.ask([ask])
        alone = {name: features.clone() for name, features in running.runner.encoder_cache.items()}
        running.llm.llm_engine.reset_encoder_cache()
        assert running.llm.reset_prefix_cache()
        running.ask(asks)
        together = running.runner.encoder_cache
        assert together.keys() == alone.keys()
        for name, features in together.items():
            assert torch.equal(features, alone[name])
