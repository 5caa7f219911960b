"""Pictures with a question and, where known, an answer: synthetic scenes, or a LLaVA-JSON file."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Sample:
    """One question about one picture; ``answer`` is None where the data has none."""

    image: Image.Image
    question: str
    answer: str | None


def read_samples(data: str, images: Path | None, seed: int) -> Iterator[Sample]:
    """Samples in a fixed order, made or read when asked for.

    ``data`` is "synthetic", scenes by ``seed``, or a file in LLaVA's JSON form, whose image names start from the folder
    ``images`` (default: the file's). ValueError: a missing file or image, or an entry of another form.
    """
    if data == SYNTHETIC:
        if images is not None:
            raise ValueError("--images goes with a data file, not with synthetic scenes")
        return _synthetic(seed)
    path = Path(data)
    if not path.is_file():
        raise ValueError(f'no such data file: {data} (or "{SYNTHETIC}")')
    folder = path.parent if images is None else images
    if not folder.is_dir():
        raise ValueError(f"no such image folder: {folder}")
    return _from_file(path, folder)


def _synthetic(seed: int) -> Iterator[Sample]:
    from vllm_hidrop.lab.train.questions import QUESTION_TYPES, draw_questions
    from vllm_hidrop.lab.train.scenes import make_scene, render

    for scene_seed in synthetic_seeds(seed):
        scene = make_scene(scene_seed)
        question = draw_questions(scene, np.random.default_rng([scene_seed, 7]), 1, tuple(QUESTION_TYPES))[0]
        yield Sample(Image.fromarray(render(scene)), question.text, question.answer)


def synthetic_seeds(seed: int) -> Iterator[int]:
    """Scene seeds of the training range: held-out scenes stay unseen until evaluation."""
    from vllm_hidrop.lab.train.scenes import FIRST_HELD_OUT_SEED

    rng = np.random.default_rng([seed, 6])
    while True:
        yield int(rng.integers(FIRST_HELD_OUT_SEED))


def _from_file(path: Path, folder: Path) -> Iterator[Sample]:
    """The first round of every entry with an image; LLaVA's instruction mix also holds entries of text only."""
    from vllm_hidrop.lab.train.conversations import PLACEHOLDER, EntriesFile

    file = EntriesFile(path, folder)
    for index in range(len(file)):
        entry = file.entry(index)
        if not entry.images:
            continue
        speakers = [said.speaker for said in entry.conversations[:2]]
        if speakers not in (["human"], ["human", "gpt"]):
            raise file.fault(index, 'the first round must be "human", then "gpt"')
        question, *answers = (said.value for said in entry.conversations[:2])
        if question.count(PLACEHOLDER) != 1 or len(entry.images) != 1:
            raise file.fault(index, f"the first question must hold {PLACEHOLDER} once and the entry one image")
        (image,) = file.open_images(index, entry.images)
        answer = answers[0].strip() if answers else ""
        yield Sample(image, question.replace(PLACEHOLDER, "").strip(), answer or None)


def take(samples: Iterator[Sample], count: int, data: str) -> Iterator[Sample]:
    """The first ``count`` samples; ValueError for fewer than 2: the cross-image curve needs another image."""
    num_taken = 0
    for sample in islice(samples, count):
        num_taken += 1
        yield sample
    if num_taken < 2:
        raise ValueError(f"{data} holds {num_taken} entries with an image; at least 2 are needed")
