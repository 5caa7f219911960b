"""Merging of windows and the choice of key tokens, against loops over patches."""

from itertools import permutations
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from vllm_hidrop.methods.adaptive import EncoderReduction, KeyLayer
from vllm_hidrop.staged.merging import Reduced, ReducedTile, key_rows, merge, packed, window_similarity, windows

settings.load_profile("ci")  # no deadline on a shared machine, the same examples every time

grids = st.sampled_from([(2, 2), (4, 2), (6, 2), (6, 3), (9, 3), (8, 4)])
"""Sides of the grid and of its windows."""


def random_patches(grid: int, size: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(grid * grid, size, generator=torch.Generator().manual_seed(seed))


def alike(patches: torch.Tensor, window: list[int]) -> torch.Tensor:
    """The patches with those of one window scaled copies of its first."""
    scales = torch.arange(1, len(window) + 1)[:, None]
    return patches.index_copy(0, torch.tensor(window), patches[window[0]] * scales)


@given(grids)
def test_windows_tile_the_grid_in_raster_order(sides: tuple[int, int]) -> None:
    grid, side = sides
    expected = [
        [(top + row) * grid + left + column for row in range(side) for column in range(side)]
        for top in range(0, grid, side)
        for left in range(0, grid, side)
    ]
    assert windows(grid * grid, side).tolist() == expected


@given(grids, st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_similarity_is_the_mean_cosine_of_all_ordered_pairs(
    sides: tuple[int, int], seed: int, dtype: torch.dtype
) -> None:
    grid, side = sides
    patches = random_patches(grid, seed=seed).to(dtype)
    patches[0] = 0  # has cosine 0 with everything
    index = windows(grid * grid, side)
    found = window_similarity(patches, index)
    exact = patches.double()
    expected = [
        torch.stack([cosine_similarity(exact[a], exact[b], dim=0) for a, b in permutations(window, 2)]).mean()
        for window in index.tolist()
    ]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-6, rtol=0)


def test_the_similarity_of_equal_opposite_and_zero_vectors() -> None:
    patches = torch.tensor([[2.0, 0], [1, 0], [3, 0], [1, 0], [1, 0], [-1, 0], [0, 0], [0, 0]])
    found = window_similarity(patches, torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 2, 6], [6, 7, 6, 7]]))
    torch.testing.assert_close(found, torch.tensor([1, 0, 0.5, 0]))


@given(grids, st.integers(0, 99), st.floats(-1, 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_merging_equals_a_loop_over_windows(
    sides: tuple[int, int], seed: int, threshold: float, dtype: torch.dtype
) -> None:
    grid, side = sides
    patches = random_patches(grid, size=2, seed=seed).to(dtype)
    index = windows(grid * grid, side)
    rows, alive = dict(enumerate(patches)), np.ones(grid * grid, dtype=np.bool_)
    stands_for = list(range(grid * grid))
    for window, similarity in zip(index.tolist(), window_similarity(patches, index), strict=True):
        if similarity >= threshold:
            rows[window[-1]] = patches[window].float().mean(0).to(dtype)
            alive[window[:-1]] = False
            for patch in window:
                stands_for[patch] = window[-1]
    merged = merge(patches, threshold, side)
    places = np.flatnonzero(alive).tolist()
    assert torch.equal(merged.rows, torch.stack([rows[place] for place in places]))
    assert np.array_equal(merged.alive, alive)
    assert [places[row] for row in merged.row_of] == stands_for


def test_one_alike_window_becomes_its_mean_at_its_bottom_right() -> None:
    patches = alike(torch.eye(16) + 0, [2, 3, 6, 7])
    merged = merge(patches, 0.8, 2)
    assert merged.alive.tolist() == [place not in (2, 3, 6) for place in range(16)]
    assert torch.equal(merged.rows[4], patches[2] * 2.5)  # of 1, 2, 3 and 4 times the same; 7 is the fifth left
    assert merged.row_of.tolist() == [0, 1, 4, 4, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert torch.equal(patches, alike(torch.eye(16), [2, 3, 6, 7])), "the input changed"


def test_similarity_that_just_reaches_the_threshold_merges() -> None:
    patches = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 0]])  # mean cosine exactly 1 / 2
    assert merge(patches, 0.5, 2).alive.tolist() == [False, False, False, True]
    assert merge(patches, 0.5000001, 2).alive.all()


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_nothing_merges(threshold: float | None) -> None:
    patches = random_patches(4)
    merged = merge(patches, threshold, 2)
    assert torch.equal(merged.rows, patches)
    assert merged.alive.all()
    assert merged.row_of.tolist() == list(range(16))


def test_everything_merges() -> None:
    patches = random_patches(6)
    merged = merge(patches, -1.0, 3)
    torch.testing.assert_close(merged.rows, patches[windows(36, 3)].mean(1))
    assert np.flatnonzero(merged.alive).tolist() == [14, 17, 32, 35]
    assert [np.flatnonzero(merged.row_of == row).tolist() for row in range(4)] == windows(36, 3).tolist()


def test_without_a_threshold_any_number_of_patches_will_do() -> None:
    assert merge(torch.ones(7, 3), None, 3).row_of.tolist() == list(range(7))


def test_zero_vectors_are_not_alike() -> None:
    assert merge(torch.zeros(4, 3), 1e-6, 2).alive.all()


def test_nan_does_not_merge() -> None:
    patches = torch.ones(16, 3)
    patches[5, 1] = torch.nan
    merged = merge(patches, -1.0, 2)
    assert np.flatnonzero(merged.alive).tolist() == [0, 1, 4, 5, 7, 13, 15]
    assert int(merged.rows.isnan().any(1).sum()) == 1


@pytest.mark.parametrize(("left", "count"), [(576, 47), (437, 35), (13, 2), (12, 1), (1, 1)])
def test_eight_percent_are_key_tokens_rounded_up(left: int, count: int) -> None:
    chosen = key_rows(torch.rand(left, generator=torch.Generator().manual_seed(left)), 0.08)
    assert len(chosen) == count
    assert chosen.dtype == torch.int64


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5]), min_size=1, max_size=40), st.floats(0, 1))
def test_key_rows_are_the_most_attended_first_among_equals(attention: list[float], rate: float) -> None:
    ranked = sorted(range(len(attention)), key=lambda row: (-attention[row], row))
    expected = sorted(ranked[: ceil(rate * len(attention))])
    assert key_rows(torch.tensor(attention), rate).tolist() == expected


def reduction(threshold: float | None = 0.8, window: int = 3) -> EncoderReduction:
    return EncoderReduction(threshold, window, 0.08, KeyLayer.LAST)


@pytest.mark.parametrize(
    ("reduces", "num_patches"), [(reduction(), 576), (reduction(window=2), 64), (reduction(None), 577)]
)
def test_a_tower_that_can_be_reduced_passes(reduces: EncoderReduction, num_patches: int) -> None:
    reduces.check(num_patches)


@pytest.mark.parametrize(
    ("reduces", "num_patches", "message"),
    [
        (reduction(), 64, "merge_window 3 does not tile the tower's 64 patches"),
        (reduction(window=2), 20, "merge_window 2 does not tile the tower's 20 patches as a square grid"),
    ],
)
def test_a_tower_that_cannot_be_reduced_is_refused(reduces: EncoderReduction, num_patches: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduces.check(num_patches)


def tile(windows_by_similarity: list[list[int]], keys: list[int]) -> ReducedTile:
    """A tile of 4 x 4 patches of which some windows merged."""
    stands_for = np.arange(16)
    for window in windows_by_similarity:
        stands_for[window] = window[-1]
    alive = stands_for == np.arange(16)
    unmerged = [patch for patch in range(16) if not any(patch in window for window in windows_by_similarity)]
    merged_first = np.array([window[-1] for window in windows_by_similarity] + unmerged)
    is_key = np.isin(np.arange(16), keys)
    return ReducedTile(Reduced(alive, is_key, merged_first), (np.cumsum(alive) - 1)[stands_for])


def test_packed_tiles_show_a_merged_window_at_its_last_patch_left() -> None:
    tiles = [tile([[2, 3, 6, 7]], [7]), tile([[10, 11, 14, 15], [0, 1, 4, 5], [8, 9, 12, 13]], [3, 5, 15])]
    rows = [[16 + 4 * row + column for column in (1, 2)] + [-1] for row in range(3)]  # no bottom row, no rim
    reduced = packed(tiles, np.array([*range(16), *rows[0], *rows[1], *rows[2]]))
    assert np.flatnonzero(~reduced.alive).tolist() == [2, 3, 6, 16]  # 1 of the second tile, as 5 of it stands for both
    assert np.flatnonzero(reduced.keys).tolist() == [7, 19, 23]  # 5, and 10 for the window of 15; 3 is not shown
    others = [token for token in range(25) if token not in (2, 3, 6, 7, 16, 19, 22, 23)]
    assert reduced.merged_first.tolist() == [7, 23, 19, 22, *others]


def test_one_packed_tile_is_the_tile() -> None:
    alone = tile([[10, 11, 14, 15], [0, 1, 4, 5]], [2, 15])
    reduced = packed([alone], np.arange(16))
    assert np.array_equal(reduced.alive, alone.reduced.alive)
    assert np.array_equal(reduced.keys, alone.reduced.keys)
    assert np.array_equal(reduced.merged_first, alone.reduced.merged_first)
