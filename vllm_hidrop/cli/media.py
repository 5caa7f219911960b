"""The images and videos of a planned request: from sizes in pixels, or numbers of tokens, to what a prompt holds."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_hidrop.plan.places import Span

if TYPE_CHECKING:
    from vllm_hidrop.models.family import Family
    from vllm_hidrop.plan.vision import VisionShape

MOST_TOKENS = 1_000_000  # of an image, a prompt, an answer or a block
MOST_PIXELS = 8192  # of a side: a picture of that size is made to be counted
MOST_FRAMES = 10_000
NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
PAIR = re.compile(r"([0-9]{1,9})x([0-9]{1,9})", re.ASCII)
Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Item:
    """An image or a video of a request.

    Attributes:
        frames: tokens of the image's one span, or of every frame's.
        num_separators: those of an image's tokens that are no vision, see ``Span``.
        num_tiles: tiles that an image is cut into, where they do not follow from its tokens.
    """

    frames: tuple[int, ...]
    num_separators: int = 0
    num_tiles: int | None = None


def image(num_tokens: int) -> Item:
    """An image of so many vision tokens."""
    return Item((num_tokens,))


def spans_of(items: Iterable[Item]) -> list[Span]:
    """The spans of a prompt that begins with these images and videos, without text between."""
    spans: list[Span] = []
    for index, item in enumerate(items):
        for num_tokens in item.frames:
            spans.append(Span(spans[-1].end if spans else 0, num_tokens, index, item.num_separators))
    return spans


def parse_images(texts: Iterable[str]) -> list[int | Size]:
    """Numbers of tokens and sizes like ``1024x768``, by comma. Raises ValueError: others, or out of range."""
    return [_image(part.strip()) for text in texts for part in text.split(",")]


def _image(text: str) -> int | Size:
    if NUMBER.fullmatch(text) and 1 <= int(text) <= MOST_TOKENS:
        return int(text)
    if (pair := PAIR.fullmatch(text)) and all(1 <= int(side) <= MOST_PIXELS for side in pair.groups()):
        return int(pair[1]), int(pair[2])
    raise ValueError(
        f"--images must be vision tokens, 1 to {MOST_TOKENS}, or pixels like 1024x768, sides of at most {MOST_PIXELS}, "
        f"got {text!r}"
    )


def video(text: str, family: "Family | None", hf_config: Any, vision: "VisionShape | None") -> Item:
    """A video as ``--video`` gives it. Raises ValueError: another text, no videos, or a frame's tokens are needed."""
    pair = PAIR.fullmatch(text)
    frames, tokens = (int(pair[1]), int(pair[2])) if pair else (int(text) if NUMBER.fullmatch(text) else 0, None)
    if not 1 <= frames <= MOST_FRAMES or not (tokens is None or 1 <= tokens <= MOST_TOKENS):
        raise ValueError(f"--video must be FRAMES or FRAMESxTOKENS, at most {MOST_FRAMES} frames, got {text!r}")
    if family is None or not family.has_video:
        raise ValueError(f"{family.title if family else 'LLaVA-1.5'} takes no videos")
    if tokens is None:
        tokens = family.frame_tokens(hf_config)
    if tokens is None and vision is not None and vision.tile_patches is not None:
        tokens = vision.tile_tokens
    if tokens is None:
        raise ValueError(f"a frame of {family.title} has tokens by its size: give --video {frames}xTOKENS")
    return Item((tokens,) * frames)


def image_of_pixels(source: str, family: "Family", hf_config: Any, size: Size) -> Item:
    """An image as the processor of a checkpoint, a directory or hub name, expands a blank one of that size.

    Raises:
        ValueError: the family takes no images, or the checkpoint has no processor of transformers' that can be asked.
    """
    if not family.is_dynamic:
        return image(family.tokens(hf_config))
    ids, image_token, tiles = _processed(source, family.title, size)
    places = [place for place, token in enumerate(ids) if token == image_token]
    if not places:
        raise ValueError(f"{family.title} takes no images")
    length = places[-1] - places[0] + 1
    return Item((length,), length - len(places), tiles)


def _processed(source: str, title: str, size: Size) -> tuple[Sequence[int], int, int | None]:
    """Token ids of a prompt with one image, the id that stands for vision, and the tiles of the image."""
    from PIL import Image
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source)
        made = processor(text=[processor.image_token], images=[Image.new("RGB", size)], return_tensors="pt")
        pixels = made["pixel_values"]
        tiles = pixels.shape[-4] if pixels.ndim > 3 and pixels.shape[-3] == 3 else None
        return made["input_ids"][0].tolist(), processor.image_token_id, tiles
    except Exception as error:  # whatever a checkpoint's files and processor complain of
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the tokens of a {size[0]}x{size[1]} image of {title} are not known: its processor cannot be asked "
            f"({first_line}); give --images vision tokens instead"
        ) from error
