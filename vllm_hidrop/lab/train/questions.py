"""Questions about a scene and their exact answers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vllm_hidrop.lab.train.scenes import COLOUR_NAMES, IMAGE_SIDE, Scene, Thing
from vllm_hidrop.lab.train.sprites import KINDS

ROW_NAMES = ("top", "middle", "bottom")
COLUMN_NAMES = ("left", "center", "right")
MIN_RELATION_PIXELS = 16
"""Things whose centres are closer than this on an axis are never compared along it."""
MIN_BORDER_PIXELS = 3
"""A thing whose centre is closer than this to an inner border of the 3x3 grid is never asked for its place."""


@dataclass(frozen=True)
class Question:
    """One question of one type; ``text`` and ``answer`` are words separated by spaces."""

    type: str
    text: str
    answer: str


def grid_cell(thing: Thing) -> tuple[int, int]:
    """Row and column (0 to 2) of the 3x3 grid that hold a thing's centre."""
    x, y = thing.centre
    return int(y * 3 // IMAGE_SIDE), int(x * 3 // IMAGE_SIDE)


def _pick(rng: np.random.Generator, items: tuple[Thing, ...]) -> Thing:
    return items[int(rng.integers(len(items)))]


def _colour(scene: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(rng, scene.objects)
    return Question("colour", f"what colour is the {thing.kind} ?", thing.colour)


def _object(scene: Scene, rng: np.random.Generator) -> Question | None:
    colours = [thing.colour for thing in scene.objects]
    unique = tuple(thing for thing in scene.objects if colours.count(thing.colour) == 1)
    if not unique:
        return None
    thing = _pick(rng, unique)
    return Question("object", f"which object is {thing.colour} ?", thing.kind)


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    if rng.random() < 0.3:
        return Question("count", "how many objects are there ?", str(len(scene.objects)))
    colour = _pick(rng, scene.objects).colour
    if rng.random() < 0.3:
        colour = COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))]
    number = sum(thing.colour == colour for thing in scene.objects)
    return Question("count", f"how many {colour} objects are there ?", str(number))


def _where(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _pick(rng, scene.objects)
    cell_side = IMAGE_SIDE / 3
    offsets = [abs(at - border) for at in thing.centre for border in (cell_side, 2 * cell_side)]
    if min(offsets) < MIN_BORDER_PIXELS:
        return None
    row, column = grid_cell(thing)
    return Question("where", f"where is the {thing.kind} ?", f"{ROW_NAMES[row]} {COLUMN_NAMES[column]}")


def _exist(scene: Scene, rng: np.random.Generator) -> Question:
    shown = {thing.kind for thing in scene.objects}
    if rng.random() < 0.5:
        return Question("exist", f"is there a {_pick(rng, scene.objects).kind} ?", "yes")
    absent = [kind for kind in KINDS if kind not in shown]
    return Question("exist", f"is there a {absent[rng.integers(len(absent))]} ?", "no")


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) < 2:
        return None
    first, second = rng.choice(len(scene.objects), size=2, replace=False)
    one, other = scene.objects[first], scene.objects[second]
    axis = int(rng.integers(2))
    distance = other.centre[axis] - one.centre[axis]
    if abs(distance) < MIN_RELATION_PIXELS:
        return None
    words = ("left of", "above")[axis]
    answer = "yes" if distance > 0 else "no"
    return Question("relation", f"is the {one.kind} {words} the {other.kind} ?", answer)


def _same(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Two hops: the colour of one object, then the one other object of that colour."""
    colours = [thing.colour for thing in scene.objects]
    paired = tuple(thing for thing in scene.objects if colours.count(thing.colour) == 2)
    if not paired:
        return None
    thing = _pick(rng, paired)
    (other,) = (one for one in paired if one.colour == thing.colour and one is not thing)
    return Question("same", f"which object has the colour of the {thing.kind} ?", other.kind)


def _read(scene: Scene, rng: np.random.Generator) -> Question | None:
    word = scene.word
    if word is None or word.text is None:
        return None
    return Question("read", "what does the text say ?", word.text)


QUESTION_TYPES: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "colour": _colour,
    "object": _object,
    "count": _count,
    "where": _where,
    "exist": _exist,
    "relation": _relation,
    "same": _same,
    "read": _read,
}
DRAW_WEIGHTS = {
    "colour": 1.0,
    "object": 1.0,
    "count": 1.6,
    "where": 1.2,
    "exist": 1.2,
    "relation": 1.8,
    "same": 1.6,
    "read": 0.5,
}


def ask(scene: Scene, question_type: str, rng: np.random.Generator) -> Question | None:
    """A question of one type, or None when this draw has no unambiguous answer."""
    return QUESTION_TYPES[question_type](scene, rng)


def draw_questions(
    scene: Scene, rng: np.random.Generator, num_questions: int, types: tuple[str, ...]
) -> list[Question]:
    """``num_questions`` questions of ``types``, drawn by ``DRAW_WEIGHTS``; some may be equal."""
    weights = np.array([DRAW_WEIGHTS[name] for name in types])
    questions: list[Question] = []
    while len(questions) < num_questions:
        for index in rng.choice(len(types), size=num_questions, p=weights / weights.sum()):
            question = ask(scene, types[index], rng)
            if question is not None and len(questions) < num_questions:
                questions.append(question)
    return questions
