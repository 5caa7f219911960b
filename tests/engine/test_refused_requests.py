"""A caller of vLLM's ``LLM`` in Python, who has no server before the engine, is told why a request was refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.engine.harness import Ask, engine, prompt
from vllm_hidrop.bench.engine_process import MeasuredEngine
from vllm_hidrop.verify.tiny_models import make_llava

REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "too few keeps": ({"hidrop_keep": [7]}, "this server has 2 stages, got 1 keeps"),
    "a misspelt key": ({"hidrop_kep": ["all", 7]}, "did you mean 'hidrop_keep'?"),
    "a misspelt method": ({"hidrop_method": "fastvv"}, "did you mean 'fastv'?"),
}


@pytest.mark.engine
def test_the_reason_is_in_the_output_and_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = prompt(np.random.default_rng(0), "3i5")
    with engine(make_llava(tmp_path, "llama", "clip"), {"method": "fastv"}) as running:
        asks = [Ask(tokens, (1,), options) for options, _ in REASONS.values()]
        found = running.llm.generate(
            [running.prompt(ask) for ask in asks], [running.params(ask) for ask in asks], use_tqdm=False
        )
        running.check_pool_is_whole()
    for output, (_, reason) in zip(found, REASONS.values(), strict=True):
        assert output.outputs[0].finish_reason == "error"
        assert reason in output.outputs[0].stop_reason
        assert any(reason in record.getMessage() for record in caplog.records)


def test_a_measured_engine_says_why_a_request_ended() -> None:
    ended = SimpleNamespace(token_ids=[], finish_reason="error", stop_reason="this server has 2 stages")
    measured = MeasuredEngine.__new__(MeasuredEngine)
    outputs: list[Any] = [SimpleNamespace(request_id="0", finished=True, outputs=[ended])]
    measured.engine, measured.running = SimpleNamespace(step=lambda: outputs), {}
    with pytest.raises(RuntimeError, match="request 0 ended: error: this server has 2 stages"):
        measured._step()
