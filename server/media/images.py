"""What an image file may be, read from its header before a pixel is decoded."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError
from vllm import envs
from vllm.exceptions import VLLMValidationError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # of Pillow's 37: each decoder runs on strangers' bytes
ALSO_JPEG = "MPO"  # a JPEG with further pictures behind the photograph, as many phones write it
MAX_ASPECT_RATIO = 200  # processors scale the shorter side up to the tower's: 1 x 20000 would become gigabytes
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
COLOUR_KEYED = ("1", "L", "RGB", *SIXTEEN_BITS)
"""Modes in which a PNG can name one colour that is transparent (its tRNS chunk). Palettes and alpha channels are
flattened on white by vLLM."""


class MediaRefused(VLLMValidationError):
    """An image, a video or a URL that this server does not take: one line, answered with 400."""


def limit_decoder() -> None:
    """Make Pillow itself refuse what is over our limit, also for sizes that only show while it decodes."""
    if envs.VLLM_MAX_IMAGE_PIXELS > 0:
        # Pillow raises above twice its limit and warns above it.
        Image.MAX_IMAGE_PIXELS = max(1, envs.VLLM_MAX_IMAGE_PIXELS // 2)
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def check_size(num_bytes: int, also: int | None = None) -> None:
    """Refuse a file over ``VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB``, or over ``also`` bytes (MediaRefused)."""
    megabytes = envs.VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB
    if megabytes > 0 and num_bytes > megabytes << 20:
        raise MediaRefused(f"the media is larger than {megabytes} MiB (VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB)")
    if also is not None and num_bytes > also:
        raise MediaRefused(f"the media is larger than {also} bytes")


def check_image(data: bytes) -> bytes:
    """Check a file by its header; returns it, converted where vLLM would misread it. MediaRefused says what is wrong.

    A greyscale file of 16 bits becomes one of 8, because Pillow would clip its values to white. A colour named as
    transparent becomes white, because vLLM would show the colour itself.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise MediaRefused(f"not an image this server reads: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise MediaRefused(_too_many_pixels()) from None
    with image:
        _check_header(image)
        if image.mode in COLOUR_KEYED and isinstance(image.info.get("transparency"), int | tuple):
            return _on_white(image, png_depth=data[24])
        return _in_eight_bits(image) if image.mode in SIXTEEN_BITS else data


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if 0 < envs.VLLM_MAX_IMAGE_PIXELS < width * height:
        raise MediaRefused(_too_many_pixels())
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise MediaRefused(f"the image is {width} x {height}: one side is over {MAX_ASPECT_RATIO} times the other")
    if image.format != ALSO_JPEG and getattr(image, "is_animated", False):
        raise MediaRefused("the image has more than one frame: send the one that is meant")
    if image.mode in ("I", "F"):
        raise MediaRefused(f"the image has 32 bits a pixel (mode {image.mode}): send 8 or 16")


def _too_many_pixels() -> str:
    return f"the image has more than {envs.VLLM_MAX_IMAGE_PIXELS} pixels (VLLM_MAX_IMAGE_PIXELS)"


def _in_eight_bits(image: Image.Image) -> bytes:
    file = io.BytesIO()
    wide = image.convert("I").point(lambda value: value * (1 / 256))
    wide.convert("L").save(file, "PNG", exif=image.getexif())
    return file.getvalue()


def _on_white(image: Image.Image, png_depth: int) -> bytes:
    """The image with its transparent colour made white.

    ``png_depth`` is the bits of a sample in the file; Pillow leaves the transparent colour in that depth.
    """
    key = image.info["transparency"]
    if image.mode == "RGB":
        pixels = np.array(image)
        pixels[(pixels == [value >> max(0, png_depth - 8) for value in key]).all(axis=-1)] = 255
    elif image.mode in SIXTEEN_BITS:
        wide = np.asarray(image)
        pixels = np.where(wide == key, 255, wide >> 8).astype(np.uint8)
    else:
        grey = np.asarray(image.convert("L"))
        pixels = np.where(grey == key * 255 // ((1 << png_depth) - 1), 255, grey).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=image.getexif(), compress_level=1)
    return file.getvalue()
