"""Where in its picture a vision token lies."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

Box = tuple[float, float, float, float]
"""Left, top, right and bottom as fractions of the picture; a cell at its rim may reach beyond it."""

PICTURE: Box = (0, 0, 1, 1)


@dataclass(frozen=True)
class Tile:
    """A rectangle of cells, token by token and row by row: that of row r and column c is token start + r * stride + c.

    Attributes:
        start: the first cell's token, counted from the first of its span.
        columns: cells in a row.
        rows: rows of cells.
        stride: tokens from one row to the next, of which those behind ``columns`` separate the rows.
        box: the part of the picture that the cells share equally.
    """

    start: int
    columns: int
    rows: int
    stride: int
    box: Box = PICTURE

    @property
    def end(self) -> int:
        """One more than the last cell's token."""
        return self.start + (self.rows - 1) * self.stride + self.columns

    def dump(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self) | {"box": [round(side, 6) for side in self.box]}


@dataclass(frozen=True)
class Grid:
    """The cells of an image's tokens, or of a video frame's; tokens of no tile are separators.

    Attributes:
        tiles: they cover the picture once.
        whole: the picture once more, in small, where the tower sees it so beside the tiles.
        is_cropped: the boxes are fractions of the picture's centre square, which is all that the tower sees.
    """

    tiles: tuple[Tile, ...]
    whole: Tile | None = None
    is_cropped: bool = False

    @property
    def end(self) -> int:
        """One more than the last cell's token."""
        return max(tile.end for tile in (*self.tiles, self.whole) if tile)

    def dump(self) -> dict[str, Any]:
        """As JSON values."""
        whole = self.whole and self.whole.dump()
        return {"tiles": [tile.dump() for tile in self.tiles], "whole": whole, "cropped": self.is_cropped}


def square(num_tokens: int, start: int = 0, box: Box = PICTURE) -> Tile:
    """A tile of as many rows as columns."""
    side = isqrt(num_tokens)
    return Tile(start, side, side, side, box)


def tiled(starts: Sequence[int], columns: int, num_tokens: int) -> tuple[Tile, ...]:
    """Square tiles of ``num_tokens`` each that cut a picture into rows of ``columns``, in reading order."""
    rows = len(starts) // columns
    places = [divmod(tile, columns) for tile in range(len(starts))]
    boxes = [(x / columns, y / rows, (x + 1) / columns, (y + 1) / rows) for y, x in places]
    return tuple(square(num_tokens, start, box) for start, box in zip(starts, boxes, strict=True))
