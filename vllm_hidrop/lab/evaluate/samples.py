"""What a benchmark's task is made of: samples in, scored samples out."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
"""The two prompt endings LLaVA-1.5 was evaluated with."""


@dataclass(frozen=True)
class Source:
    """The user's files that a task reads, how many questions to draw, and the seed of the draw."""

    data: Path | None = None
    images: Path | None = None
    limit: int | None = None
    seed: int = 0

    def data_path(self) -> Path:
        """The file or folder of ``--data``; ValueError when it was not given."""
        if self.data is None:
            raise ValueError("this task needs --data")
        return self.data

    def image_path(self, name: str) -> Path:
        """A file in the folder of ``--images``; ValueError when that was not given."""
        if self.images is None:
            raise ValueError("this task needs --images")
        return self.images / name


@dataclass(frozen=True)
class Sample:
    """One question. Calling ``image`` reads the file; ``group`` names samples that a limit must not part."""

    id: str
    question: str
    image: Callable[[], bytes]
    expected: tuple[str, ...]
    type: str
    options: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Scored:
    """A sample and its score in [0, 1]; a failed request scores 0."""

    sample: Sample
    score: float
    failed: bool = False


@dataclass(frozen=True)
class Task:
    """How a benchmark is read, asked and scored.

    ``load`` raises ValueError that names file, line and what was expected; ``score`` gives a sample's text a score in
    [0, 1]; ``max_tokens`` limits an answer; ``figures`` is what the benchmark reports besides the mean score.
    """

    load: Callable[[Source], list[Sample]]
    score: Callable[[Sample, str], float]
    max_tokens: int
    figures: Callable[[Sequence[Scored]], dict[str, float]] = lambda _: {}


def choose(samples: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """At most ``limit`` samples drawn by ``seed``, in file order; a larger limit draws a superset.

    Groups stay whole, so the last one may exceed the limit.
    """
    if limit is None or limit >= len(samples):
        return list(samples)
    sizes = Counter(sample.group or sample.id for sample in samples)
    groups, chosen, size = list(sizes), set(), 0
    for index in np.random.default_rng(seed).permutation(len(groups)):
        if size >= limit:
            break
        chosen.add(groups[index])
        size += sizes[groups[index]]
    return [sample for sample in samples if (sample.group or sample.id) in chosen]


def checked_images(paths: Iterable[Path]) -> list[Callable[[], bytes]]:
    """Readers of image files; a missing one fails here, before the first question: ValueError names it."""
    listed = list(paths)
    unique = set(listed)
    if missing := sorted(path for path in unique if not path.is_file()):
        raise ValueError(f"{missing[0]}: no such image ({len(missing)} of {len(unique)} missing)")
    return [partial(_read_image, path) for path in listed]


def _read_image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
