"""VisiPruner's numbers from readings, by hand."""

import pytest
import torch

from vllm_hidrop.lab.calibrate.contributions import Readings
from vllm_hidrop.lab.calibrate.thresholds import (
    above,
    below,
    cosine_threshold,
    cut_layers,
    exit_threshold,
    filter_layer,
    norm_threshold,
    propose_visipruner,
    quiet_layers,
)
from vllm_hidrop.methods.scoring import Contribution
from vllm_hidrop.plan.schedule import Keep


def layer(norm: list[float], cosine: list[float]) -> Contribution:
    return Contribution(torch.tensor(norm), torch.tensor(cosine))


def test_quiet_layers_end_where_answers_change_and_leave_room() -> None:
    assert quiet_layers([1.0, 0.99, 0.9, 1.0], 0.01, 8) == 2
    assert quiet_layers([1.0, 0.99, 0.9, 1.0], 0.1, 6) == 3
    assert quiet_layers([0.5], 0.01, 8) == 0


def test_the_deciding_layer_is_the_first_from_which_every_cut_is_harmless() -> None:
    assert filter_layer([0.2, 1.0, 0.5, 1.0, 1.0], 0, 0.01) == (3, None)
    assert filter_layer([1.0] * 5, 2, 0.01) == (3, None)
    chosen, note = filter_layer([None, None, 0.5, 0.8, 0.8], 0, 0.01)
    assert chosen == 3
    assert note is not None
    assert "layer 3, which changes fewest" in note


def test_steps_of_the_written_decimals() -> None:
    assert (above(0.5), above(0.1234564), above(1.0)) == (0.500001, 0.123457, 1.0)
    assert (below(0.5), below(0.1234567)) == (0.5, 0.123456)


def test_no_sample_is_cut_before_the_deciding_layer() -> None:
    least = [[0.1, 0.1, 0.9, 0.8, 0.3, 0.9], [0.1, 0.1, 0.95, 0.85, 0.9, 0.2]]
    cosine = cosine_threshold(least, 1, 4)
    assert cosine == 0.8
    assert cut_layers(least, 1, cosine) == [4, None]  # the last layer is not tested
    assert cut_layers(least, 1, cosine_threshold(least, 1, 2)) == [2, 2]


def test_the_norm_lies_between_the_last_kept_and_the_first_dropped_token() -> None:
    layers = [layer([5, 1, 4], [0, 0, 0]), layer([3, 9, 2], [0, 0, 0]), layer([7, 8, 6], [0, 0, 0])]
    assert norm_threshold(layers, Keep(count=2)) == 2.5
    assert norm_threshold(layers, Keep.parse("1/3")) == 6.0
    assert norm_threshold(layers, Keep(count=3)) == 0


def test_no_sample_leaves_before_the_exit() -> None:
    least = [{3: 0.9, 4: 0.7, 5: 0.8, 6: 0.95, 7: 0.99}]
    assert exit_threshold(least, 8) == above(0.8)  # layers 5 and 6 would let it leave before layer 7
    assert exit_threshold(least, 7) == above(0.7)
    assert exit_threshold(least, 5) == 0.7


def test_a_proposal_is_whole_and_says_what_it_does_to_the_samples() -> None:
    reads = [layer([1, 2, 3, 4], [0.999, 0.998, 0.997, 0.9]) if i == 3 else layer([0] * 4, [1] * 4) for i in range(8)]
    readings = Readings([reads], [1.0, 1.0, 0.5, 0.5], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], [0.0] * 5 + [1.0] * 3)
    found = propose_visipruner(readings, Keep(count=2), 0.01, 4)
    assert (found.shallow_layers, found.filter_layer, found.exit_layer) == (2, 3, 5)
    assert found.thresholds.norm == 2.5
    assert found.thresholds.cosine == pytest.approx(0.9, abs=2e-6)
    assert found.notes == (
        "by these thresholds 1 of 1 samples are cut, after layers 3 to 3 (zero-based), and keep 2 to 2 tokens",
    )
    assert found.options(fixed=True) == {
        "parts": ["shallow", "middle", "deep"],
        "shallow_layers": 2,
        "sink": "first",
        "shape": [8, 4],
        "filter_layer": 3,
        "keep": 2,
        "exit_layer": 5,
    }
    with pytest.raises(ValueError, match="at least 3 layers, the model has 2"):
        propose_visipruner(Readings([reads], [1.0], [1.0], [1.0, 1.0]), Keep(count=2), 0.01, 4)
