"""Rows of samples packed one behind the other. Axes: N rows of the full prompts, N' rows left, B samples, C hidden."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def packed_starts(lengths: Sequence[int]) -> Tensor:
    """``row_starts`` of samples with so many rows each: int32 [B + 1], in host memory."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def places_in_samples(row_starts: Tensor) -> Tensor:
    """0, 1, 2, ... for every sample's rows, int64 [N], in host memory."""
    return torch.cat([torch.arange(length) for length in row_starts.diff().tolist()])


@dataclass(frozen=True)
class Rows:
    """What the rows of packed samples are.

    Attributes:
        positions: int64 [N], RoPE ids of the full prompt.
        images: int64 [N], index of the row's image in its sample, -1 for text.
        is_query: bool [N], the last instruction token of every dialogue round: a target follows, none precedes.
        row_starts: int32 [B + 1], where each sample starts, then N; in host memory.
    """

    positions: Tensor
    images: Tensor
    is_query: Tensor
    row_starts: Tensor

    @property
    def is_vision(self) -> Tensor:
        """Whether a row is an image's, bool [N]."""
        return self.images >= 0

    @property
    def lengths(self) -> list[int]:
        """Rows of every sample."""
        lengths: list[int] = self.row_starts.diff().tolist()
        return lengths

    def take(self, order: Tensor) -> "Rows":
        """The rows at ``order``, int64 [N'] ascending."""
        starts = torch.searchsorted(order, self.row_starts.to(order), out_int32=True).cpu()
        return Rows(self.positions[order], self.images[order], self.is_query[order], starts)

    def image_rows(self) -> Iterator[tuple[int, int, Tensor]]:
        """Sample, image and the rows int64 [V] of every image that has any."""
        start = 0
        for sample, images in enumerate(self.images.split(self.lengths)):
            for image in images[images >= 0].unique().tolist():
                yield sample, image, (images == image).nonzero().flatten() + start
            start += len(images)


@dataclass(frozen=True)
class State:
    """The rows that are left: hidden [N', C], places int64 [N'] among the full rows, ascending.

    ``presence`` [N'] is 1 and carries the gradient of the cuts behind.
    """

    hidden: Tensor
    places: Tensor
    rows: Rows
    presence: Tensor | None = None

    def take(self, order: Tensor) -> "State":
        """The rows at ``order``, int64 ascending."""
        presence = None if self.presence is None else self.presence[order]
        return State(self.hidden[order], self.places[order], self.rows.take(order), presence)


def all_rows(hidden: Tensor, rows: Rows) -> State:
    """The state in which every row of the full prompts is there: hidden [N, C]."""
    return State(hidden, torch.arange(len(hidden), device=hidden.device), rows)


def grouped_positions(rows: Rows) -> Tensor:
    """Positions [N] of text numbered without the images, of vision as they are."""
    texts = (~rows.is_vision).long().split(rows.lengths)
    return torch.where(rows.is_vision, rows.positions, torch.cat([text.cumsum(0) - 1 for text in texts]))


def compacted_positions(rows: Rows) -> Tensor:
    """Positions [N] with an image's survivors numbered on from the row before them."""
    positions, starts = rows.positions.clone(), rows.row_starts.tolist()
    for sample, _, here in rows.image_rows():
        before = int(here[0]) - 1
        first = int(rows.positions[before]) + 1 if before >= starts[sample] else 0
        positions[here] = first + torch.arange(len(here), device=positions.device)
    return positions
