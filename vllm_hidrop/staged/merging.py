"""Fewer vision tokens inside the vision tower: merging of alike neighbours, and the choice of key tokens."""

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
    """What became of one image's patches, as host data.

    Attributes:
        alive: bool [V], the patches that still stand for a token.
        keys: bool [V], those of them that no method may drop.
        merged_first: int64 [V'], the patches alive with the merged ones first, see :class:`Merged`.
    """

    alive: npt.NDArray[np.bool_]
    keys: npt.NDArray[np.bool_]
    merged_first: npt.NDArray[np.int64]


def windows(num_patches: int, side: int) -> torch.Tensor:
    """Patch indices of every window of a square grid, int64 [W, side * side]; raster order, so bottom-right last."""
    grid = isqrt(num_patches)
    patches = torch.arange(num_patches).view(grid // side, side, grid // side, side)
    return patches.permute(0, 2, 1, 3).reshape(-1, side * side)


def window_similarity(patches: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Mean cosine over all pairs of different tokens of each window, float32 [W] (MustDrop section 3.1).

    Args:
        patches: [V, C].
        index: int64 [W, m], m > 1.
    """
    unit = normalize(patches.float(), dim=-1)[index]
    size = index.shape[1]
    # The squared norm of a sum of unit vectors is the sum of their cosines, each with itself included.
    return (unit.sum(dim=1).square().sum(-1) - unit.square().sum((1, 2))) / (size * (size - 1))


class Merged(NamedTuple):
    """One image's patches after merging."""

    rows: torch.Tensor
    """[V', C], in raster order."""
    alive: npt.NDArray[np.bool_]
    """bool [V], the patches in whose place a row stands."""
    row_of: npt.NDArray[np.int64]
    """int64 [V], the row that stands for each patch."""
    merged_first: npt.NDArray[np.int64]
    """int64 [V'], the patches alive in the order of the released MustDrop: merged windows by falling similarity, the
    first in raster order of equal ones, then the other patches in raster order."""


def merge(patches: torch.Tensor, threshold: float | None, side: int) -> Merged:
    """Merge each window of alike tokens into its mean, in the place of its bottom-right patch.

    One transfer to the host: which windows merge, as the tower really runs on fewer rows from here.

    Args:
        patches: [V, C], raster order.
        threshold: least similarity of a window that merges; None: none does.
        side: of a window, in patches.
    """
    num_patches = patches.shape[0]
    alive = np.ones(num_patches, dtype=np.bool_)
    stands_for = np.arange(num_patches)
    if threshold is None:
        return Merged(patches, alive, stands_for, stands_for)
    index = windows(num_patches, side).to(patches.device)
    similarity, order = window_similarity(patches, index).sort(descending=True, stable=True)
    chosen = index[order[similarity >= threshold]]
    host = chosen.cpu().numpy()
    alive[host[:, :-1].ravel()] = False
    stands_for[host] = host[:, -1:]
    is_merged = np.zeros_like(alive)
    is_merged[host] = True
    merged_first = np.concatenate((host[:, -1], np.flatnonzero(~is_merged)))
    merged = patches.index_copy(0, chosen[:, -1], patches[chosen].float().mean(1).to(patches.dtype))
    rows = merged[torch.from_numpy(np.flatnonzero(alive)).to(patches.device)]
    return Merged(rows, alive, (np.cumsum(alive) - 1)[stands_for], merged_first)


def key_rows(class_attention: torch.Tensor, key_rate: float) -> torch.Tensor:
    """The rows that the class token attends to most, int64 [ceil(key_rate * V')], ascending.

    Args:
        class_attention: float32 [V'], mean over heads.
        key_rate: share of them, in [0, 1].
    """
    return select_top(class_attention, ceil(Fraction(str(key_rate)) * len(class_attention)))
