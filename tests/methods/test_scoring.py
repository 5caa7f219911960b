"""Selection and the scores that need no attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hidrop.methods.scoring import RowAttention, Signals, attention_score, random_score, select_top, uniform_score

settings.load_profile("ci")  # no deadline on a shared machine, the same examples every time


def slow_select_top(scores: list[float], keep: int) -> list[int]:
    """One at a time: the highest score left, the lowest index among equals."""
    left = list(range(len(scores)))
    chosen = []
    for _ in range(keep):
        best = left[0]
        for index in left:
            if scores[index] > scores[best]:
                best = index
        left.remove(best)
        chosen.append(best)
    return sorted(chosen)


def signals_of(survivors: list[int], keep: int, layer: int = 2, num_image_tokens: int | None = None) -> Signals:
    image = num_image_tokens if num_image_tokens is not None else max(survivors) + 1
    return Signals(layer, keep, image, torch.tensor(survivors), None)


@given(st.data())
def test_selection_equals_the_slow_reference_ties_included(data: st.DataObject) -> None:
    # Few distinct values make ties at the boundary common.
    value = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))
    scores = data.draw(st.lists(value, min_size=1, max_size=60))
    keep = data.draw(st.integers(1, len(scores)))
    chosen = select_top(torch.tensor(scores), keep)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == slow_select_top(scores, keep)


def test_equal_scores_keep_the_lowest_indices_however_many_there_are() -> None:
    assert select_top(torch.full((5_000,), 0.5), 1_700).tolist() == list(range(1_700))


def test_the_attention_is_the_score() -> None:
    attention = torch.tensor([0.1, 0.3, 0.2])
    assert attention_score(Signals(2, 1, 3, torch.arange(3), RowAttention(attention))) is attention


@given(st.data())
def test_uniform_picks_exactly_keep_evenly_spaced_survivors(data: st.DataObject) -> None:
    num_survivors = data.draw(st.integers(2, 600))
    keep = data.draw(st.integers(1, num_survivors - 1))
    scores = uniform_score(signals_of(list(range(0, 3 * num_survivors, 3)), keep))
    assert scores.shape == (num_survivors,)
    assert scores.dtype == torch.float32
    assert int(scores.sum()) == keep
    chosen = select_top(scores, keep)
    assert chosen.tolist() == scores.nonzero().flatten().tolist()
    gaps = chosen.diff()
    assert not len(gaps) or int(gaps.max() - gaps.min()) <= 1


def test_uniform_takes_the_middle_of_equal_bins() -> None:
    assert uniform_score(signals_of(list(range(9)), 3)).nonzero().flatten().tolist() == [1, 4, 7]


def test_uniform_scores_are_float32_whatever_the_default_type() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert uniform_score(signals_of(list(range(9)), 3)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@given(st.sets(st.integers(0, 575), min_size=2), st.integers(0, 40), st.integers(0, 2**31))
def test_random_depends_on_seed_layer_and_place_only(survivors: set[int], layer: int, seed: int) -> None:
    some = sorted(survivors)
    whole = random_score(signals_of(list(range(576)), 1, layer), seed)
    scores = random_score(signals_of(some, 1, layer, 576), seed)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, whole[some])
    assert torch.equal(scores, random_score(signals_of(some, len(some) - 1, layer, 576), seed))


@pytest.mark.parametrize(("layer", "seed"), [(3, 0), (2, 1)])
def test_random_differs_between_layers_and_seeds(layer: int, seed: int) -> None:
    everything = list(range(576))
    base = random_score(signals_of(everything, 10, layer=2), seed=0)
    assert not torch.equal(base, random_score(signals_of(everything, 10, layer=layer), seed))
