"""Inside the vision tower: similar neighbour patches are merged, and key tokens chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import normalize

from vllm_hidrop.methods.scoring import select_top


@dataclass(frozen=True)
class Reduced:
    """What the vision tower left of one image's V patches, as host data.

    Attributes:
        alive: bool [V], patches in whose place a row of the tower is left.
        keys: bool [V], patches alive that are key tokens, which no method may drop.
        merged_first: int64 [V'], the patches alive with the merged ones first, see :class:`Merged`.
    """

    alive: npt.NDArray[np.bool_]
    keys: npt.NDArray[np.bool_]
    merged_first: npt.NDArray[np.int64]


class ReducedTile(NamedTuple):
    """What the vision tower left of one tile's V patches, and int64 [V], the row that stands for each patch."""

    reduced: Reduced
    row_of: npt.NDArray[np.int64]


def packed(tiles: Sequence[ReducedTile], places: npt.NDArray[np.int64]) -> Reduced:
    """What is left of an image whose tokens are the patches of several tiles and newlines.

    ``places`` are int64 [tokens]: the tile's number * V + the patch, or -1 for a newline. A merged window is the last
    of its patches that is a token, and nothing where none is. Newlines stay and are no key tokens. First of the order
    are the merged windows, tile by tile, then all other tokens left in the image's order.
    """
    num_rows = [0, *np.cumsum([tile.reduced.alive.sum() for tile in tiles])]
    row_of = np.concatenate([tile.row_of + first for tile, first in zip(tiles, num_rows[:-1], strict=True)])
    is_patch = places >= 0
    token_of = np.full(num_rows[-1], -1)
    token_of[row_of[places[is_patch]]] = np.flatnonzero(is_patch)  # of a row's several tokens the last one is left
    alive = ~is_patch
    alive[token_of[token_of >= 0]] = True

    is_key_row = np.concatenate([tile.reduced.keys[tile.reduced.alive] for tile in tiles])
    keys = np.zeros_like(alive)
    keys[token_of[is_key_row & (token_of >= 0)]] = True

    sizes = np.bincount(row_of)
    order = np.concatenate([t.row_of[t.reduced.merged_first] + n for t, n in zip(tiles, num_rows[:-1], strict=True)])
    merged = token_of[order[sizes[order] > 1]]
    merged = merged[merged >= 0]
    others = alive.copy()
    others[merged] = False
    return Reduced(alive, keys, np.concatenate((merged, np.flatnonzero(others))))


def windows(num_patches: int, side: int) -> torch.Tensor:
    """Patch indices of every window of a square grid, int64 [W, side * side]; raster order, so bottom-right last."""
    grid = isqrt(num_patches)
    patches = torch.arange(num_patches).view(grid // side, side, grid // side, side)
    return patches.permute(0, 2, 1, 3).reshape(-1, side * side)


def window_similarity(patches: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Mean cosine over all pairs of different tokens of each window, float32 [W] (MustDrop section 3.1).

    ``patches`` are [V, C], ``index`` int64 [W, m], m > 1: the patches of every window.
    """
    unit = normalize(patches.float(), dim=-1)[index]
    size = index.shape[1]
    # The squared norm of a sum of unit vectors is the sum of their cosines, each with itself included.
    return (unit.sum(dim=1).square().sum(-1) - unit.square().sum((1, 2))) / (size * (size - 1))


class Merged(NamedTuple):
    """One image's V patches after merging.

    Attributes:
        rows: [V', C], in raster order.
        alive: bool [V], patches in whose place a row is left.
        row_of: int64 [V], the row that stands for each patch.
        merged_first: int64 [V'], the patches alive in the order of the released MustDrop: merged windows by falling
            similarity, equal ones in raster order, then the other patches in raster order.
    """

    rows: torch.Tensor
    alive: npt.NDArray[np.bool_]
    row_of: npt.NDArray[np.int64]
    merged_first: npt.NDArray[np.int64]


def merge(patches: torch.Tensor, threshold: float | None, side: int) -> Merged:
    """Merge windows of ``side`` x ``side`` patches whose similarity reaches ``threshold`` (None: none) into their mean.

    ``patches`` are [V, C] in raster order; the mean takes the place of its window's bottom-right patch. One transfer to
    the host: the number of rows that the tower's later layers run depends on which windows merge.
    """
    num_patches = patches.shape[0]
    alive = np.ones(num_patches, dtype=np.bool_)
    stands_for = np.arange(num_patches)
    if threshold is None:
        return Merged(patches, alive, stands_for, stands_for)
    index = windows(num_patches, side).to(patches.device)
    similarity, order = window_similarity(patches, index).sort(descending=True, stable=True)
    merging = index[order[similarity >= threshold]]
    merging_on_host = merging.cpu().numpy()
    bottom_right = merging_on_host[:, -1]
    alive[merging_on_host[:, :-1].ravel()] = False
    stands_for[merging_on_host] = bottom_right[:, None]
    is_merged = np.zeros_like(alive)
    is_merged[merging_on_host] = True
    merged_first = np.concatenate((bottom_right, np.flatnonzero(~is_merged)))
    merged = patches.index_copy(0, merging[:, -1], patches[merging].float().mean(1).to(patches.dtype))
    rows = merged[torch.from_numpy(np.flatnonzero(alive)).to(patches.device)]
    return Merged(rows, alive, (np.cumsum(alive) - 1)[stands_for], merged_first)


def key_rows(class_attention: torch.Tensor, key_rate: float) -> torch.Tensor:
    """The rows with the highest ``class_attention``, float32 [V']: int64 [ceil(key_rate * V')], ascending."""
    return select_top(class_attention, ceil(Fraction(str(key_rate)) * len(class_attention)))
