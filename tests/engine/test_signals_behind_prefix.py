"""Methods that score by signals whose rows a cached prefix lacks: a request behind one is answered as it is cold."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.harness import Ask, engine, prompt
from vllm_hidrop.lab.train.staged import check_trainable
from vllm_hidrop.methods import METHODS, Method, ModelShape
from vllm_hidrop.methods.scoring import Contribution, Signals, TextAttention
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.verify.tiny_models import make_llava

PREFIX = "999999999"  # 81 tokens and the first one: two blocks of 32 and more


class Cuts(Method):
    """Nine tokens of every image from layer 3 on."""

    def schedule(self, shape: ModelShape) -> Schedule:
        return Schedule.of({0: "all", 3: 9}, shape.num_layers)


@dataclass(frozen=True)
class ByText(Cuts):
    name = "by_text"
    paper = summary = ""
    signal = Signal.TEXT_ATTENTION

    def score(self, signals: Signals) -> torch.Tensor:
        return signals.read(TextAttention).total


@dataclass(frozen=True)
class ByNorm(Cuts):
    name = "by_norm"
    paper = summary = ""
    signal = Signal.CONTRIBUTION

    def score(self, signals: Signals) -> torch.Tensor:
        return signals.read(Contribution).norm


@pytest.fixture(params=[ByText, ByNorm])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(METHODS, request.param.name, request.param)
    return request.param.name


@pytest.mark.engine
def test_a_prompt_behind_a_cached_one_keeps_what_it_keeps_cold(tmp_path: Path, method: str) -> None:
    rng = np.random.default_rng(7)
    start = prompt(rng, PREFIX)
    asks = [Ask(start + prompt(rng, layout)[1:], (1, 2), {"hidrop_explain": True}) for layout in ("i5i4", "i5i6")]
    asks.append(Ask(asks[0].tokens + prompt(rng, "7")[1:], (1, 2), {"hidrop_explain": True}))
    with engine(make_llava(tmp_path, "mistral"), {"method": method}) as running:
        warm = [running.ask([ask])[0] for ask in asks]
        cold = []
        for ask in asks:
            assert running.llm.reset_prefix_cache()
            cold += running.ask([ask])
    for found, expected in zip(warm, cold, strict=True):
        assert found.token_ids == expected.token_ids
        assert found.report["stages"] == expected.report["stages"]
        assert (found.report["reused_tokens"], found.report["reuse_off"]) == (0, "signal")


def test_training_refuses_them(method: str) -> None:
    with pytest.raises(ValueError, match="which training does not compute: none, next_attention, previous_attention"):
        check_trainable(METHODS[method]())
