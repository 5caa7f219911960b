"""Where the tokens of a prompt stand in a stage that keeps only some of them.

::

    prompt place     0 1 2 3 4 5 6 7 8 9      t t v v v v t v v t    two images, of four tokens and of two
    stage place      0 1     2 3 4     5      t t     v v t     t    two kept of the first, none of the second

A stage place counts the tokens of the stage from the start of the prompt; it is the token's slot in the stage's cache.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Span:
    """Where the vision tokens of one image, or of one frame of a video, stand: ``[offset, offset + length)``.

    ``item`` is the index, in prompt order, of the image or video among a prompt's; ``num_separators`` of the tokens are
    no vision but stay with it: breaks behind rows, text between tiles.
    """

    offset: int
    length: int
    item: int = 0
    num_separators: int = 0

    @property
    def end(self) -> int:
        """Exclusive end."""
        return self.offset + self.length


@dataclass(frozen=True)
class StagePlaces:
    """Where one stage holds one prompt's tokens: of the images at ``spans``, ascending, ``kept`` tokens each."""

    spans: tuple[Span, ...]
    kept: tuple[int, ...]

    @cached_property
    def images(self) -> tuple[Span, ...]:
        """The kept tokens of each image, in stage places."""
        images, dropped = [], 0
        for span, kept in zip(self.spans, self.kept, strict=True):
            images.append(Span(span.offset - dropped, kept))
            dropped += span.length - kept
        return tuple(images)

    def count(self, num_tokens: int) -> int:
        """Tokens of the stage among the request's first ``num_tokens``, which must not end within an image."""
        dropped = 0
        for span, kept in zip(self.spans, self.kept, strict=True):
            if span.offset < num_tokens:
                assert span.end <= num_tokens, "an image cannot be split"
                dropped += span.length - kept
        return num_tokens - dropped

    def prompt_places(self, num_tokens: int, survivors: Iterable[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
        """The prompt place of every token of the stage, int64 [n], in stage order, in a prompt of ``num_tokens``.

        ``survivors`` are int32 per image, the tokens that are kept: zero-based inside the image, in stage order.
        """
        pieces, cursor = [], 0
        for span, tokens in zip(self.spans, survivors, strict=True):
            pieces += [np.arange(cursor, span.offset), tokens.astype(np.int64) + span.offset]
            cursor = span.end
        return np.concatenate([*pieces, np.arange(cursor, num_tokens)])

    def vision_places(self) -> npt.NDArray[np.int64]:
        """Stage places of the vision tokens, int64 [V]."""
        return np.concatenate([np.arange(image.offset, image.end) for image in self.images])

    def text_behind_first_image(self, num_tokens: int) -> npt.NDArray[np.int64]:
        """Stage places of the text tokens behind the first image, int64 [N], in a prompt of ``num_tokens``."""
        is_text = np.ones(self.count(num_tokens), dtype=np.bool_)
        is_text[: self.images[0].offset] = False
        is_text[self.vision_places()] = False
        return np.flatnonzero(is_text)
