"""What vLLM does with a V2 runner before it serves, on CUDA only: hand-made steps that warm kernels up."""

from pathlib import Path

import numpy as np
import pytest
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker
from vllm.v1.worker.gpu.warmup import warmup_kernels

from tests.engine.harness import Ask, engine, prompt
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine


def test_the_warmup_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests have no scheduler of ours, its steps no orders; later answers are those without it."""
    choice = {"method": "hidrop", "preset": "tok48", "options": {"scale": True}, "positions": "grouped"}
    asks = [Ask(prompt(np.random.default_rng(1), "3i5"), (1,)), Ask(prompt(np.random.default_rng(2), "9"))]
    model = make_llava(tmp_path)
    with engine(model, choice) as running:
        expected = [answer.token_ids for answer in running.ask(asks)]
    # Its kernel does not run in Triton's interpreter.
    monkeypatch.setattr(StructuredOutputsWorker, "apply_grammar_bitmask", lambda *_: None)
    with engine(model, choice) as running:
        worker = running.core.model_executor.driver_worker.worker
        warmup_kernels(running.runner, worker.execute_model, worker.sample_tokens)
        assert not running.runner.staged.records
        assert not running.runner.req_states.req_id_to_index
        assert [answer.token_ids for answer in running.ask(asks)] == expected
