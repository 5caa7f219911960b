"""Decode graphs of pruned engines: replays answer as eager steps do, and the emulation catches what would not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.model_executor.models.llama import LlamaDecoderLayer

from tests.engine.harness import Ask, Engine, engine, prompt
from tests.v2.graph_emulation import Emulation, Graph, NotCapturableError
from vllm_hidrop.runners import v2
from vllm_hidrop.runners.stage_inputs import StageInputs
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

SIZES = [1, 2, 4, 8]
PYRAMID = {"method": "pyramiddrop", "options": {"cuts": [0.25, 0.5], "keeps": [30, 3]}}
HIDROP = {"method": "hidrop", "preset": "tok48", "options": {"scale": True}}
METHODS: dict[str, dict[str, Any]] = {
    "hidrop": HIDROP,
    "grouped": HIDROP | {"positions": "grouped"},
    "visipruner": {"method": "visipruner", "options": {"scale": True}},
    "mustdrop": {"method": "mustdrop", "options": {"scale": True, "merge_threshold": None}},
}
LAYOUTS = {"3i5": 1, "i7": 1, "2ii3i4": 3, "9": 0, "1i1": 1}


def asks(**options: Any) -> list[Ask]:
    rng = np.random.default_rng(3)
    return [
        Ask(prompt(rng, layout), tuple(range(10 * i, 10 * i + images)), options, max_tokens=4 + i)
        for i, (layout, images) in enumerate(LAYOUTS.items())
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


def tokens(running: Engine) -> list[list[int]]:
    """All requests together, then one alone, twice: the second time its image is reused, and one row is left."""
    together = [answer.token_ids for answer in running.ask(asks())]
    return together + [running.ask(asks()[-1:])[0].token_ids for _ in range(2)]


@contextmanager
def with_graphs(model: Path, choice: dict[str, Any] | None) -> Iterator[tuple[Engine, dict[Any, Graph]]]:
    emulation = Emulation()
    with emulation.installed(SIZES), engine(model, choice, max_num_seqs=8) as running:
        yield running, emulation.capture(running.runner)


def eager(model: Path, choice: dict[str, Any] | None) -> list[list[int]]:
    with engine(model, choice, max_num_seqs=8) as running:
        return tokens(running)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return eager(model, PYRAMID)


def test_replays_answer_as_eager_steps_and_hold_stocks_operators(model: Path, expected: list[list[int]]) -> None:
    with with_graphs(model, None) as (_, graphs):
        of_stock = {desc.num_tokens: len(graph.operators) for desc, graph in graphs.items()}
    with with_graphs(model, PYRAMID) as (running, graphs):
        assert {desc.num_tokens: len(graph.operators) for desc, graph in graphs.items()} == of_stock
        assert sorted(of_stock) == SIZES
        assert tokens(running) == expected
        assert all(graph.num_replays for graph in graphs.values())


@pytest.mark.parametrize("choice", METHODS.values(), ids=METHODS)
def test_replays_of_other_methods_answer_as_eager_steps(model: Path, choice: dict[str, Any]) -> None:
    wanted = eager(model, choice)
    with with_graphs(model, choice) as (running, graphs):
        assert tokens(running) == wanted
        assert sum(graph.num_replays for graph in graphs.values()) > 10


def test_stocks_own_replays_answer_as_its_eager_steps(model: Path) -> None:
    wanted = eager(model, None)
    with with_graphs(model, None) as (running, _):
        assert tokens(running) == wanted


class Control:
    """One fault of a staged runner that only graphs bring out."""

    def single_row_prefill(self, patch: pytest.MonkeyPatch) -> None:
        """A prefill of one row is called a decode."""
        gather = v2.StagedRunner.gather_batch_req_state

        def uniform(runner: Any, *args: Any) -> Any:
            state, _ = gather(runner, *args)
            counts = set(state.num_scheduled_tokens.tolist())
            return state, 1 if counts == {1} else None

        patch.setattr(v2.StagedRunner, "gather_batch_req_state", uniform)

    def shared_metadata(self, patch: pytest.MonkeyPatch) -> None:
        """Stages that hold the same rows at the capture share its metadata."""
        patch.setattr(v2.StageMetadata, "key", lambda metadata, stage: metadata.rows.stages[stage].key)

    def fresh_buffers(self, patch: pytest.MonkeyPatch) -> None:
        """Every step writes its sequence lengths to a new tensor."""
        full_rows = StageInputs.full_rows

        def fresh(inputs: Any, batch: Any) -> Any:
            inputs.seq_lens = inputs.seq_lens.clone()
            return full_rows(inputs, batch)

        patch.setattr(StageInputs, "full_rows", fresh)


@pytest.mark.parametrize("fault", ["single_row_prefill", "shared_metadata", "fresh_buffers"])
def test_the_emulation_answers_wrongly_where_a_device_would(
    model: Path, expected: list[list[int]], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    getattr(Control(), fault)(monkeypatch)
    with with_graphs(model, PYRAMID) as (running, _):
        assert tokens(running) != expected


def test_a_read_by_the_host_is_not_captured(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaDecoderLayer.forward

    def reading(layer: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, residual = forward(layer, *args, **kwargs)
        hidden.sum().item()
        return hidden, residual

    monkeypatch.setattr(LlamaDecoderLayer, "forward", reading)
    with pytest.raises(NotCapturableError, match="item"), with_graphs(model, PYRAMID):
        pass
