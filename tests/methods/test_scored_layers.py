"""Cuts in models some of whose layers have no attention: which can be scored, and where published ones move to."""

from typing import Any

import pytest

from vllm_hidrop.config import HidropConfig, make_method, moved_note, resolve
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.methods.scored_layers import check_scored_layers, nearest_cuts
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.plan.signal import Signal

QWEN35 = ModelShape(32, 1024, True, "Qwen3.5", tuple(range(3, 32, 4)))
"""Qwen3.5-9B's."""


@pytest.mark.parametrize(
    ("signal", "wanted", "moved"),
    [
        (Signal.NEXT_ATTENTION, [8, 16, 24], [7, 15, 23]),
        (Signal.NEXT_ATTENTION, [3, 5, 6], [3, 7, 11]),  # 5 is as near to 3, which is taken
        (Signal.NEXT_ATTENTION, [5], [3]),
        (Signal.NEXT_ATTENTION, [30, 31], [31, 31]),  # none is left
        (Signal.PREVIOUS_ATTENTION, [2], [4]),
        (Signal.PREVIOUS_ATTENTION, [31], [28]),
        (Signal.NONE, [2, 9], [2, 9]),
    ],
)
def test_a_cut_moves_to_the_nearest_layer_that_can_score_it(
    signal: Signal, wanted: list[int], moved: list[int]
) -> None:
    assert nearest_cuts(signal, wanted, QWEN35) == moved
    assert nearest_cuts(signal, wanted, ModelShape(32, 1024)) == wanted


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        ({"method": "fastv"}, [0, 4]),
        ({"method": "fastv", "options": {"keep": 0.25, "exit_layer": 9}}, [0, 4, 9]),
        ({"method": "fastv", "options": {"layer": 8}}, [0, 8]),
        ({"method": "pyramiddrop"}, [0, 7, 15, 23]),
        ({"method": "random"}, [0, 2]),
        ({"method": "fastv", "options": {"layer": 2, "keep": 0}}, [0, 2]),
    ],
)
def test_cuts_that_the_user_does_not_name_move(choice: dict[str, Any], layers: list[int]) -> None:
    resolved = resolve(HidropConfig.parse(choice), QWEN35)
    assert [stage.first_layer for stage in resolved.schedule.stages] == layers
    assert resolved.method.schedule(QWEN35) == resolved.schedule
    assert resolved.moved.items() <= resolved.options.items()
    assert bool(moved_note(resolved)) == bool(resolved.moved)


def test_a_checkpoints_own_choice_moves_as_it_was_trained() -> None:
    assert resolve(HidropConfig.parse({}), QWEN35, {"method": "fastv"}).options == {"layer": 4}
    with pytest.raises(ValueError, match="was trained for fastv"):
        resolve(HidropConfig.parse({"method": "fastv", "options": {"layer": 8}}), QWEN35, {"method": "fastv"})


@pytest.mark.parametrize("keeps", [{0: 0, 2: "all", 5: 0}, {0: "all", 3: 9, 5: 9, 6: 0}, {0: "all"}])
def test_what_chooses_nothing_may_lie_anywhere(keeps: dict[int, Any]) -> None:
    check_scored_layers(make_method("pyramiddrop"), Schedule.of(keeps, 32), QWEN35)
    with pytest.raises(ValueError, match=r"the cut at layer 3 .* usable for cuts: layers none"):
        check_scored_layers(
            make_method("pyramiddrop"), Schedule.of({0: "all", 3: 9}, 32), ModelShape(32, 1, True, "Qwen3.5", ())
        )
