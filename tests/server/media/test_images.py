"""What an image file may be, decided from its header; no engine."""

import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vllm import envs
from vllm.multimodal.media import ImageMediaIO

from hidrop_server.control.settings import SETTINGS
from hidrop_server.media.connector import Decoder, HidropMediaConnector
from hidrop_server.media.images import MediaRefused, limit_decoder
from hidrop_server.media.videos import VideoLimits
from tests.server.harness import data_url, picture, png_that_claims
from tests.server.media.files import (
    EPS,
    PDF,
    SVG,
    animated,
    bomb,
    icon_bomb,
    palette_with_alpha,
    saved,
    sixteen_bits,
    turned,
)


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    envs.disable_envs_cache()  # an engine of an earlier test has frozen them
    for each in SETTINGS:
        if not each.name.startswith("--") and not each.embedded:
            monkeypatch.setenv(each.name, each.default)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    limit_decoder()


VIDEOS = VideoLimits(max_frames=32, max_seconds=300, max_megapixels=100, decode_seconds=30)


def decode(file: bytes) -> Image.Image:
    """As a data: URL is decoded."""
    image: Image.Image = Decoder(ImageMediaIO()).load_base64("image/png", data_url(file).partition(",")[2]).media
    return image


REFUSED: dict[str, tuple[str, bytes]] = {
    "no bytes": ("not an image", b""),
    "half a PNG": ("truncated", picture()[:200]),
    "SVG": ("not an image", SVG),
    "PDF": ("not an image", PDF),
    "PostScript": ("not an image", EPS),
    "a format of vLLM's that nobody sends": ("not an image", saved(Image.new("RGB", (64, 64)), "SGI")),
    "an icon with a bomb in it": ("not an image", icon_bomb()),
    "animated GIF": ("frame", animated("GIF")),
    "animated WebP": ("frame", animated("WEBP")),
    "animated PNG": ("frame", animated("PNG")),
    "TIFF of pages": ("frame", animated("TIFF")),
    "32 bits a pixel": ("32 bits", saved(Image.new("F", (64, 64)), "TIFF")),
    "a line": ("over 200 times", saved(Image.new("RGB", (1, 20_000)), "PNG")),
    "a header of 60 megapixels": ("VLLM_MAX_IMAGE_PIXELS", png_that_claims(10_000, 6_000)),
    "a header of 400 megapixels": ("VLLM_MAX_IMAGE_PIXELS", png_that_claims(20_000, 20_000)),
    "a file over the limit": ("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", bytes((20 << 20) + 1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_in_a_line_that_says_why(name: str) -> None:
    says, file = REFUSED[name]
    with pytest.raises(MediaRefused) as caught:
        decode(file)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    file = bomb()
    assert len(file) < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MediaRefused, match="VLLM_MAX_IMAGE_PIXELS"):
        decode(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "KiB"


def colour(file: bytes, x: float = 0.5, y: float = 0.5) -> tuple[int, ...]:
    image = decode(file)
    assert image.mode == "RGB"
    found = image.getpixel((int(x * image.width), int(y * image.height)))
    assert isinstance(found, tuple)
    return found


def near(found: tuple[int, ...], wanted: tuple[int, int, int]) -> bool:
    return all(abs(a - b) <= 6 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_that_is_named_is_read(image_format: str) -> None:
    file = saved(Image.new("RGB", (192, 192), (0, 128, 0)), image_format)
    assert near(colour(file), (0, 128, 0))


def test_a_cmyk_photo_is_read_in_its_colours() -> None:
    file = saved(Image.new("RGB", (192, 192), (200, 20, 20)).convert("CMYK"), "JPEG")
    assert near(colour(file), (200, 20, 20))


def test_sixteen_bits_are_as_bright_as_eight() -> None:
    """Pillow makes every value over 255 white."""
    assert near(colour(sixteen_bits()), (128, 128, 128))


def test_what_is_transparent_is_white() -> None:
    assert colour(palette_with_alpha()) == (255, 255, 255)


def keyed(mode: str, colour: Any, key: Any) -> bytes:
    """A PNG of one colour, with a colour that is transparent."""
    return saved(Image.new(mode, (192, 192), colour), "PNG", transparency=key)


def few_bits(depth: int, level: int, key: int) -> bytes:
    """A grey PNG of less than eight bits a pixel; Pillow writes none with a key."""
    rows = b"".join(
        b"\0" + bytes([sum(level << shift for shift in range(0, 8, depth))]) * (64 * depth // 8) for _ in range(64)
    )
    header = struct.pack(">IIBBBBB", 64, 64, depth, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"tRNS", struct.pack(">H", key)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


TRANSPARENT: dict[str, bytes] = {
    "RGB": keyed("RGB", (9, 8, 7), (9, 8, 7)),
    "grey": keyed("L", 9, 9),
    "grey of 16 bits": keyed("I;16", 999, 999),
    "black and white": few_bits(1, 0, 0),
    "white and black": few_bits(1, 1, 1),
    "grey of 2 bits": few_bits(2, 2, 2),
    "grey of 4 bits": few_bits(4, 9, 9),
    "grey and alpha": saved(Image.new("LA", (192, 192), (9, 0)), "PNG"),
    "RGB and alpha": saved(Image.new("RGBA", (192, 192), (9, 8, 7, 0)), "PNG"),
    "RGB and alpha as WebP": saved(Image.new("RGBA", (192, 192), (9, 8, 7, 0)), "WEBP", lossless=True),
    "RGB and alpha as TIFF": saved(Image.new("RGBA", (192, 192), (9, 8, 7, 0)), "TIFF"),
    "a palette": palette_with_alpha(),
    "a palette as GIF": saved(Image.new("P", (192, 192), 3), "GIF", transparency=3),
}
OPAQUE: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "RGB": (keyed("RGB", (9, 8, 7), (9, 8, 8)), (9, 8, 7)),
    "grey": (keyed("L", 9, 10), (9, 9, 9)),
    "grey of 16 bits": (keyed("I;16", 1 << 15, 999), (128, 128, 128)),
    "grey of 4 bits": (few_bits(4, 9, 8), (153, 153, 153)),
    "black and white": (few_bits(1, 0, 1), (0, 0, 0)),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_every_way_to_be_transparent_is_white(name: str) -> None:
    assert colour(TRANSPARENT[name]) == (255, 255, 255)


@pytest.mark.parametrize("name", OPAQUE)
def test_a_colour_beside_the_transparent_one_stays(name: str) -> None:
    file, wanted = OPAQUE[name]
    assert near(colour(file), wanted)


def test_a_photo_with_a_transparent_colour_is_turned_all_the_same() -> None:
    image = Image.new("RGB", (192, 192), (0, 0, 200))
    image.paste((200, 0, 0), (0, 0, 96, 192))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = saved(image, "PNG", transparency=(0, 0, 200), exif=exif)
    assert near(colour(file, 0.5, 0.1), (200, 0, 0))
    assert colour(file, 0.5, 0.9) == (255, 255, 255)


@pytest.mark.parametrize(("red_side", "x", "y"), [("left", 0.1, 0.5), ("top", 0.5, 0.1), ("right", 0.9, 0.5)])
def test_a_photo_is_turned_as_its_exif_says(red_side: str, x: float, y: float) -> None:
    assert near(colour(turned(red_side), x, y), (254, 0, 0))


def test_one_pixel_is_an_image() -> None:
    assert decode(saved(Image.new("RGB", (1, 1)), "PNG")).size == (1, 1)


def test_a_phones_jpeg_with_more_pictures_behind_it_is_its_first() -> None:
    first, second = Image.new("RGB", (64, 64), (0, 128, 0)), Image.new("RGB", (64, 64), (9, 9, 9))
    assert near(colour(saved(first, "MPO", save_all=True, append_images=[second])), (0, 128, 0))


def test_a_local_file_that_is_not_there_is_refused_without_its_path(tmp_path: Path) -> None:
    refused: list[None] = []
    connector = HidropMediaConnector(
        allowed_local_media_path=str(tmp_path), on_refused=lambda: refused.append(None), videos=VIDEOS
    )
    (tmp_path / "here.png").write_bytes(picture())
    assert connector.load_from_url((tmp_path / "here.png").as_uri(), ImageMediaIO()).media.size == (192, 192)
    with pytest.raises(MediaRefused) as caught:
        connector.load_from_url((tmp_path / "nothing.png").as_uri(), ImageMediaIO())
    assert str(tmp_path) not in str(caught.value)
    assert len(refused) == 1
