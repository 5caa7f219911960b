"""Seeded synthetic scenes: objects and a word on a noisy background.

A scene is symbols first (what stands where) and pixels second, so that questions have exact answers and a language
model can be taught on symbols alone. Coordinates are pixels of the ``IMAGE_SIDE`` square, x to the right, y down.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_hidrop.lab.train.sprites import KINDS, WORD_HEIGHT, object_mask, word_mask

IMAGE_SIDE = 192
PATCH_SIDE = 8
PATCHES_PER_SIDE = IMAGE_SIDE // PATCH_SIDE
NUM_PATCHES = PATCHES_PER_SIDE**2
LATTICE = 4
SIZES = (20, 28)
GAP = 8
"""Pixels between two things, enough that no patch touches both."""
WORD_FRACTION = 0.7
MIN_INK_PIXELS = 3

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 34),
    "green": (24, 152, 44),
    "blue": (28, 62, 218),
    "yellow": (248, 222, 20),
    "cyan": (20, 214, 226),
    "pink": (250, 90, 200),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
WORDS = (
    *("stop", "open", "exit", "taxi", "cafe", "sale", "help", "park"),
    *("hotel", "bank", "free", "menu", "shop", "bus", "zoo", "gold"),
)
COLOUR_NAMES = tuple(COLOURS)

FIRST_HELD_OUT_SEED = 1_000_000_000
"""Training seeds are below it, held-out seeds are not."""
UNSEEN_PAIRS = frozenset((kind, COLOUR_NAMES[3 * index % len(COLOURS)]) for index, kind in enumerate(KINDS[::2]))
"""Kinds and colours that meet in held-out scenes only."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Thing:
    """An object or a word: what it is and its box in pixels."""

    kind: str
    colour: str
    left: int
    top: int
    width: int
    height: int
    text: str | None = None

    @property
    def is_word(self) -> bool:
        """Whether this is the written word."""
        return self.text is not None

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) in pixels."""
        return self.left + self.width / 2, self.top + self.height / 2


@dataclass(frozen=True)
class Scene:
    """What an image shows; ``seed`` also fixes its background and noise."""

    seed: int
    things: tuple[Thing, ...]

    @property
    def objects(self) -> tuple[Thing, ...]:
        """All things but the word."""
        return tuple(thing for thing in self.things if not thing.is_word)

    @property
    def word(self) -> Thing | None:
        """The written word, if there is one."""
        return next((thing for thing in self.things if thing.is_word), None)


def held_out_seed(index: int) -> int:
    """Seed of the ``index``-th held-out scene, never used in training."""
    return FIRST_HELD_OUT_SEED + index


def _colours_of(kind: str, seed: int) -> tuple[str, ...]:
    if seed >= FIRST_HELD_OUT_SEED:
        return COLOUR_NAMES
    return tuple(colour for colour in COLOUR_NAMES if (kind, colour) not in UNSEEN_PAIRS)


def _is_free(taken: list[Thing], left: int, top: int, width: int, height: int) -> bool:
    return all(
        left >= other.left + other.width + GAP
        or other.left >= left + width + GAP
        or top >= other.top + other.height + GAP
        or other.top >= top + height + GAP
        for other in taken
    )


def _find_place(
    rng: np.random.Generator, taken: list[Thing], width: int, height: int, num_tries: int = 30
) -> tuple[int, int] | None:
    """A free (left, top) on the lattice, or None after ``num_tries``."""
    columns = (IMAGE_SIDE - width) // LATTICE + 1
    rows = (IMAGE_SIDE - height) // LATTICE + 1
    for draw_x, draw_y in rng.random((num_tries, 2)):
        left, top = int(draw_x * columns) * LATTICE, int(draw_y * rows) * LATTICE
        if _is_free(taken, left, top, width, height):
            return left, top
    return None


@dataclass
class _Draft:
    seed: int
    rng: np.random.Generator
    things: list[Thing]

    def add(self, kind: str, shape: tuple[int, int], text: str | None = None) -> None:
        """Append one thing of ``shape`` (width, height) when there is room for it."""
        place = _find_place(self.rng, self.things, *shape)
        if place is not None:
            colours = _colours_of(kind, self.seed)
            colour = colours[self.rng.integers(len(colours))]
            self.things.append(Thing(kind, colour, *place, *shape, text))

    def add_word(self) -> None:
        """Append one word when there is room for it."""
        text = WORDS[self.rng.integers(len(WORDS))]
        self.add("word", (word_mask(text).shape[1], WORD_HEIGHT), text)

    def add_object(self, kind: str) -> None:
        """Append one object of either size when there is room for it."""
        size = SIZES[self.rng.integers(2)]
        self.add(kind, (size, size))

    def scene(self) -> Scene:
        """The finished scene."""
        return Scene(self.seed, tuple(self.things))


def make_scene(seed: int) -> Scene:
    """3 to 7 objects of different kinds, as far as there is room, and in 70 % of scenes a word."""
    draft = _Draft(seed, np.random.default_rng([seed, 0]), [])
    rng = draft.rng
    if rng.random() < WORD_FRACTION:
        draft.add_word()
    num_objects = int(rng.integers(3, 8))
    for kind in rng.permutation(len(KINDS))[:num_objects]:
        draft.add_object(KINDS[kind])
    return draft.scene()


def make_crowded_scene(seed: int) -> Scene:
    """Up to 27 things, words among them: many labelled patches for teaching the tower."""
    draft = _Draft(seed, np.random.default_rng([seed, 1]), [])
    rng = draft.rng
    for _ in range(int(rng.integers(0, 6))):
        draft.add_word()
    for kind in rng.integers(len(KINDS), size=int(rng.integers(14, 23))):
        draft.add_object(KINDS[kind])
    return draft.scene()


def thing_mask(thing: Thing) -> NDArray[np.float32]:
    """Coverage of a thing's box, [height, width] in [0, 1]."""
    return object_mask(thing.kind, thing.width) if thing.text is None else word_mask(thing.text)


def _background(rng: np.random.Generator) -> NDArray[np.float32]:
    """A gradient between two muted colours with pixel noise, [side, side, 3]."""
    start, end = rng.uniform(85, 165, size=(2, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, IMAGE_SIDE, dtype=np.float32)
    ramp = axis[:, None] * np.float32(np.sin(angle)) + axis[None, :] * np.float32(np.cos(angle))
    noise = rng.standard_normal((IMAGE_SIDE, IMAGE_SIDE, 1), dtype=np.float32) * 7
    image: NDArray[np.float32] = start + (end - start) * (ramp[..., None] * 0.7 + 0.5) + noise
    return image


def render(scene: Scene) -> Pixels:
    """The scene's pixels, [IMAGE_SIDE, IMAGE_SIDE, 3] uint8; the same for the same scene."""
    rng = np.random.default_rng([scene.seed, 2])
    image = _background(rng)
    for thing in scene.things:
        mask = thing_mask(thing)[..., None]
        rows = slice(thing.top, thing.top + thing.height)
        columns = slice(thing.left, thing.left + thing.width)
        paint = np.asarray(COLOURS[thing.colour], np.float32) + rng.uniform(-12, 12, 3)
        grain = rng.standard_normal(mask.shape, dtype=np.float32) * 3
        image[rows, columns] += mask * (paint + grain - image[rows, columns])
    return np.clip(image, 0, 255).astype(np.uint8)


def patch_owners(scene: Scene) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The thing each patch shows, an index into ``scene.things`` or -1 for background, and whether the patch is clear.

    Both are [NUM_PATCHES]; a patch is not clear where it holds some, but too few (``MIN_INK_PIXELS``), pixels of a
    thing.
    """
    owners = np.full((PATCHES_PER_SIDE, PATCHES_PER_SIDE), -1, np.int64)
    is_clear = np.ones_like(owners, dtype=np.bool_)
    canvas = np.zeros((IMAGE_SIDE, IMAGE_SIDE), np.float32)
    for index, thing in enumerate(scene.things):
        canvas[:] = 0
        canvas[thing.top : thing.top + thing.height, thing.left : thing.left + thing.width] = thing_mask(thing) > 0.4
        shape = (PATCHES_PER_SIDE, PATCH_SIDE, PATCHES_PER_SIDE, PATCH_SIDE)
        ink = canvas.reshape(shape).sum((1, 3))
        owners[ink >= MIN_INK_PIXELS] = index
        is_clear &= (ink == 0) | (ink >= MIN_INK_PIXELS)
    return owners.reshape(-1), is_clear.reshape(-1)
