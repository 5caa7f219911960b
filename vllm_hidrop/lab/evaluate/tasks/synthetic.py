"""Held-out synthetic scenes, the embedded model's own domain: one question per scene, types in turn.

One question per scene makes the samples independent, which the bootstrap assumes. Every ``--seed`` draws scenes of its
own, which the checkpoint's training, evaluation and examples never drew.
"""

import io
from collections.abc import Iterator
from functools import partial
from itertools import count, islice

import numpy as np
from PIL import Image

from vllm_hidrop.lab.evaluate.samples import Sample, Source, Task
from vllm_hidrop.lab.train.questions import QUESTION_TYPES, ask
from vllm_hidrop.lab.train.scenes import held_out_seed, make_scene, render

FIRST_SCENE = 1_000_000
SCENES_PER_SEED = 1_000_000
DEFAULT_LIMIT = 140
MAX_LIMIT = SCENES_PER_SEED // 10
"""Some scenes allow no question of the type in turn; ten scenes per question are more than enough."""


def load(source: Source) -> list[Sample]:
    """``source.limit`` questions, the types in turn; ValueError: more than a seed's scenes give, or a negative seed."""
    limit = DEFAULT_LIMIT if source.limit is None else source.limit
    if limit > MAX_LIMIT:
        raise ValueError(f"--limit must be at most {MAX_LIMIT} for synthetic scenes, got {limit}")
    if source.seed < 0:
        raise ValueError(f"--seed must not be negative, got {source.seed}")
    return list(islice(_samples(source.seed), limit))


def _samples(seed: int) -> Iterator[Sample]:
    first = FIRST_SCENE + seed * SCENES_PER_SEED
    types = tuple(QUESTION_TYPES)
    num_samples = 0
    for index in count(first):
        scene_seed = held_out_seed(index)
        rng = np.random.default_rng([scene_seed, 7])
        question = ask(make_scene(scene_seed), types[num_samples % len(types)], rng)
        if question is not None:
            num_samples += 1
            image = partial(scene_png, scene_seed)
            yield Sample(f"{index}/{question.type}", question.text, image, (question.answer,), question.type)


def scene_png(scene_seed: int) -> bytes:
    """A scene as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(render(make_scene(scene_seed))).save(file, "PNG")
    return file.getvalue()


def score(sample: Sample, text: str) -> float:
    """1 where the words are exactly the expected ones."""
    return float(text.split() == sample.expected[0].split())


TASK = Task(load, score, max_tokens=8)
