"""Writes sample images with questions: ``python -m vllm_hidrop.lab.train.examples MODEL_DIR OUT``.

Takes held-out scenes that are rich but not crowded and that the checkpoint answers right.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vllm_hidrop.lab.train.evaluate import COUNT, Checkpoint
from vllm_hidrop.lab.train.questions import QUESTION_TYPES, Question, ask
from vllm_hidrop.lab.train.scenes import IMAGE_SIDE, SIZES, Scene, Thing, held_out_seed, make_scene, render

FIRST_EXAMPLE_SCENE = 50_000
NUM_EXAMPLES = 5
MIN_OBJECTS = 5
MIN_LARGE_OBJECTS = 4
MIN_COLOURS = 5
MIN_BORDER_PIXELS = 8
TYPES = ("read", "relation", "colour", "where", "object", "exist")


def _is_off_border(thing: Thing) -> bool:
    right, bottom = thing.left + thing.width, thing.top + thing.height
    return min(thing.left, thing.top, IMAGE_SIDE - right, IMAGE_SIDE - bottom) >= MIN_BORDER_PIXELS


def _is_attractive(scene: Scene) -> bool:
    """A word, many colours, most objects large, objects on all sides but off the border."""
    colours = {thing.colour for thing in scene.things}
    quarters = {(thing.centre[0] > IMAGE_SIDE / 2, thing.centre[1] > IMAGE_SIDE / 2) for thing in scene.objects}
    num_large = sum(thing.width == max(SIZES) for thing in scene.objects)
    is_varied = scene.word is not None and len(colours) >= MIN_COLOURS and len(quarters) == 4
    is_clear = all(_is_off_border(thing) for thing in scene.things) and num_large >= MIN_LARGE_OBJECTS
    return is_varied and is_clear and len(scene.objects) >= MIN_OBJECTS


def _questions(scene: Scene) -> dict[str, Question]:
    rng = np.random.default_rng([scene.seed, 6])
    drawn = {name: ask(scene, name, rng) for name in QUESTION_TYPES if name != COUNT}
    return {name: question for name, question in drawn.items() if question is not None}


def _as_typed(question: Question) -> str:
    """The question as a person would type it."""
    text = re.sub(r"\ba (?=[aeiou])", "an ", question.text.replace(" ?", "?"))
    return text[0].upper() + text[1:]


def choose(checkpoint: Checkpoint) -> Iterator[tuple[Scene, dict[str, Question]]]:
    """Attractive held-out scenes that the checkpoint answers right in all types but count."""
    index = FIRST_EXAMPLE_SCENE
    while True:
        scene = make_scene(held_out_seed(index))
        index += 1
        if not _is_attractive(scene):
            continue
        image, questions = render(scene), _questions(scene)
        answers = [(checkpoint.generate(image, _as_typed(one)), one.answer) for one in questions.values()]
        if len(questions) == len(TYPES) and all(got == expected for got, expected in answers):
            yield scene, questions


def write_examples(checkpoint: Checkpoint, directory: Path) -> None:
    """Write ``scene_1.png`` and so on, and ``questions.jsonl`` with two questions per image."""
    directory.mkdir(parents=True, exist_ok=True)
    types = cycle(TYPES)
    lines = []
    for number, (scene, questions) in enumerate(islice(choose(checkpoint), NUM_EXAMPLES), start=1):
        name = f"scene_{number}.png"
        Image.fromarray(render(scene)).save(directory / name, optimize=True)
        for question in (questions[next(types)], questions[next(types)]):
            lines.append({"image": name, "question": _as_typed(question), "answer": question.answer})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "questions.jsonl").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write sample images with questions.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    write_examples(Checkpoint(options.model_dir), options.out)


if __name__ == "__main__":
    main()
