"""Image files as strangers send them: valid ones of every kind, and ones that must be refused."""

import io
import struct
import zlib
from typing import Any

from PIL import Image

from tests.server.harness import png_that_claims

BOMB = (13_000, 13_000)
"""169 megapixels: half a megabyte of PNG that unpacks to half a gigabyte."""


def saved(image: Image.Image, image_format: str, **more: Any) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    image.save(file, image_format, **more)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG that really holds as many pixels as it claims, all alike."""
    width, height = BOMB
    row = bytes(1 + width // 8 + (width % 8 > 0))
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(row * 100) for _ in range(height // 100)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animated(image_format: str, num_frames: int = 3) -> bytes:
    """A file of several different frames."""
    first, *rest = [Image.new("RGB", (64, 64), (80 * index, 0, 0)) for index in range(num_frames)]
    return saved(first, image_format, save_all=True, append_images=rest)


def turned(red_side: str) -> bytes:
    """A JPEG whose EXIF says to turn it; left half red, right half blue as stored."""
    image = Image.new("RGB", (192, 192), "blue")
    image.paste("red", (0, 0, 96, 192))
    exif = Image.Exif()
    exif[0x0112] = {"left": 1, "top": 6, "right": 3}[red_side]
    return saved(image, "JPEG", exif=exif)


def sixteen_bits() -> bytes:
    """A grey PNG of 16 bits a pixel, half as bright as white."""
    return saved(Image.new("I;16", (192, 192), 1 << 15), "PNG")


def palette_with_alpha() -> bytes:
    """A PNG with a palette whose first colour is transparent."""
    image = Image.new("RGB", (192, 192), "green").quantize(4)
    return saved(image, "PNG", transparency=0)


def icon_bomb() -> bytes:
    """An ICO of a few bytes that says it is small and holds a PNG that says it is large."""
    inner = png_that_claims(20_000, 20_000)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
PDF = b"%PDF-1.7\n1 0 obj << /Type /Catalog >> endobj\ntrailer << /Root 1 0 R >>\n%%EOF\n"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
