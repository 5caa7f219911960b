"""Masks of what a scene shows: drawn shapes, icon glyphs, words."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Mask = NDArray[np.float32]
"""Coverage in [0, 1] of a sprite's pixels, [height, width]."""

WORD_HEIGHT = 16
WORD_FONT_PIXELS = 18
SUPERSAMPLING = 4

GLYPHS = {
    "heart": "\u2665",
    "moon": "\u263e",
    "sun": "\u2600",
    "umbrella": "\u2602",
    "note": "\u266a",
    "anchor": "\u2693",
    "plane": "\u2708",
    "phone": "\u260e",
    "crown": "\u265b",
    "cloud": "\u2601",
}


def _polygon(corners: int, start_degrees: float, inner: float = 1.0) -> list[tuple[float, float]]:
    """Points of a regular polygon (or star, when ``inner`` < 1) in the unit square."""
    points = []
    for index in range(corners):
        angle = math.radians(start_degrees + 360 * index / corners)
        radius = 0.5 * (inner if index % 2 else 1.0)
        points.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return points


_ARROW = [(0, 0.32), (0.5, 0.32), (0.5, 0.05), (1, 0.5), (0.5, 0.95), (0.5, 0.68), (0, 0.68)]
_CROSS = [
    *[(0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67)],
    *[(0.67, 1), (0.33, 1), (0.33, 0.67), (0, 0.67), (0, 0.33), (0.33, 0.33)],
]
_POLYGONS = {
    "triangle": [(0.5, 0.02), (1.0, 0.95), (0.0, 0.95)],
    "diamond": _polygon(4, 90),
    "hexagon": _polygon(6, 0),
    "star": _polygon(10, -90, inner=0.42),
    "arrow": _ARROW,
    "cross": _CROSS,
}
_Box = tuple[float, float, float, float]


def _draw_boxed(kind: str, draw: ImageDraw.ImageDraw, side: int) -> None:
    full: _Box = (0, 0, side - 1, side - 1)
    border = side * 0.24
    hole: _Box = (border, border, side - 1 - border, side - 1 - border)
    shape: Callable[..., None] = draw.ellipse if kind in ("circle", "ring") else draw.rectangle
    shape(full, fill=255)
    if kind in ("ring", "frame"):
        shape(hole, fill=0)


SHAPES = ("circle", "square", "ring", "frame", *_POLYGONS)
KINDS: tuple[str, ...] = (*SHAPES, *GLYPHS)


def font_path(name: str) -> str:
    """Path of a DejaVu font file; it ships in matplotlib's wheel."""
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


def _to_mask(image: Image.Image) -> Mask:
    return np.asarray(image, dtype=np.float32) / 255.0


def _shape_mask(kind: str, size: int) -> Mask:
    side = size * SUPERSAMPLING
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    if kind in _POLYGONS:
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in _POLYGONS[kind]], fill=255)
    else:
        _draw_boxed(kind, draw, side)
    return _to_mask(image.resize((size, size), Image.Resampling.BOX))


def _ink(text: str, font_name: str, font_pixels: int) -> Image.Image:
    """A picture of ``text``, cropped to its ink."""
    font = ImageFont.truetype(font_path(font_name), font_pixels)
    canvas = Image.new("L", (font_pixels * (len(text) + 2), font_pixels * 2), 0)
    ImageDraw.Draw(canvas).text((font_pixels // 2, 0), text, font=font, fill=255)
    return canvas.crop(canvas.getbbox())


def _glyph_mask(kind: str, size: int) -> Mask:
    ink = _ink(GLYPHS[kind], "DejaVuSans.ttf", 128)
    scale = size / max(ink.size)
    fitted = ink.resize(
        (max(1, round(ink.width * scale)), max(1, round(ink.height * scale))),
        Image.Resampling.BOX,
    )
    image = Image.new("L", (size, size), 0)
    image.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return _to_mask(image)


@cache
def object_mask(kind: str, size: int) -> Mask:
    """Mask [size, size] of one kind of object; ``KeyError`` for an unknown kind."""
    if kind in GLYPHS:
        return _glyph_mask(kind, size)
    if kind in SHAPES:
        return _shape_mask(kind, size)
    raise KeyError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")


@cache
def word_mask(text: str) -> Mask:
    """Mask [WORD_HEIGHT, width] of a word in capitals; the width is a multiple of 4."""
    ink = _ink(text.upper(), "DejaVuSans-Bold.ttf", WORD_FONT_PIXELS)
    width = math.ceil(ink.width / 4) * 4
    image = Image.new("L", (width, WORD_HEIGHT), 0)
    image.paste(ink, ((width - ink.width) // 2, (WORD_HEIGHT - ink.height) // 2))
    return _to_mask(image)
