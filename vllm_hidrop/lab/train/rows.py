"""Rows of right-padded prompts. Axes: B samples, T rows of the full prompts, T' rows left of them, C hidden size."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What the rows of right-padded prompts are; every tensor [B, T].

    Attributes:
        positions: int64, RoPE ids of the full prompt.
        images: int64, index of the row's image in its sample, -1 for text.
        is_valid: bool, false on padding.
        is_query: bool, the last instruction token of every dialogue round: a target follows, none precedes.
    """

    positions: Tensor
    images: Tensor
    is_valid: Tensor
    is_query: Tensor

    @property
    def is_vision(self) -> Tensor:
        """Whether a row is an image's, bool [B, T]."""
        return (self.images >= 0) & self.is_valid

    def take(self, columns: Tensor, is_valid: Tensor) -> "Rows":
        """The rows at ``columns`` [B, T']."""
        is_query = self.is_query.gather(1, columns) & is_valid
        return Rows(self.positions.gather(1, columns), self.images.gather(1, columns), is_valid, is_query)


@dataclass(frozen=True)
class State:
    """The current rows of every sample, left-aligned: hidden [B, T', C], columns [B, T'] among the full rows.

    ``presence`` [B, T'] is 1 and carries the gradient of the cuts behind.
    """

    hidden: Tensor
    columns: Tensor
    rows: Rows
    presence: Tensor | None = None


def left_aligned(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the kept rows in their order, [B, T'], padded at the right, and which of them are rows."""
    num_rows = kept.sum(1)
    order = (~kept).int().argsort(dim=1, stable=True)[:, : int(num_rows.max())]
    return order, torch.arange(order.shape[1], device=kept.device) < num_rows[:, None]


def gather(state: State, kept: Tensor) -> State:
    """The valid rows among those in ``kept``, bool [B, T']."""
    return take_columns(state, *left_aligned(kept & state.rows.is_valid))


def take_columns(state: State, order: Tensor, is_valid: Tensor) -> State:
    """The rows at ``order`` [B, T']."""
    hidden = state.hidden.gather(1, order[..., None].expand(-1, -1, state.hidden.shape[2]))
    presence = None if state.presence is None else state.presence.gather(1, order)
    return State(hidden, state.columns.gather(1, order), state.rows.take(order, is_valid), presence)


def take_head_rows(heads: Tensor, order: Tensor) -> Tensor:
    """Rows ``order`` [B, T'] of query, key or value [B, heads, T, D]."""
    return heads.gather(2, order[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[3]))


def renumbered_positions(positions: Tensor) -> Tensor:
    """Positions 0, 1, 2, ... for left-aligned rows, [B, T']."""
    return torch.arange(positions.shape[1], device=positions.device).expand_as(positions)


def grouped_positions(rows: Rows) -> Tensor:
    """Positions [B, T] of text numbered without the images, of vision as they are."""
    is_text = rows.images < 0
    return torch.where(is_text, is_text.long().cumsum(1) - 1, rows.positions)


def compacted_positions(rows: Rows) -> Tensor:
    """Positions [B, T'] with an image's survivors numbered on from the row before them."""
    positions = rows.positions.clone()
    for sample in range(len(positions)):
        for image in range(int(rows.images[sample].max()) + 1):
            here = ((rows.images[sample] == image) & rows.is_valid[sample]).nonzero().flatten()
            if len(here):
                before = int(here[0]) - 1
                first = int(rows.positions[sample, before]) + 1 if before >= 0 else 0
                positions[sample, here] = first + torch.arange(len(here), device=positions.device)
    return positions
