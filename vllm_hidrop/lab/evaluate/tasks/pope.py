"""POPE, is there an object or not: accuracy, precision, recall, F1, yes ratio.

**Source**: Li et al. 2023, arXiv 2305.10355; parsing as in LLaVA's ``eval_pope.py``.
**Format**: JSON lines ``{"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}``,
one file or a folder of ``coco_pope_{random,popular,adversarial}.json``; images in ``--images``.
**Differs**: a figure whose denominator is 0 is 0, where the official script divides by zero.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from vllm_hidrop.lab.evaluate.reading import read_json_lines
from vllm_hidrop.lab.evaluate.samples import SHORT_ANSWER, Sample, Scored, Source, Task, checked_images, choose

PREFIX = "coco_pope_"


class _Question(BaseModel):
    question_id: int | str
    image: str
    text: str
    label: Literal["yes", "no"]


def load(source: Source) -> list[Sample]:
    """All questions of the file or folder; ValueError: wrong format, a missing file, or a label besides yes and no."""
    path = source.data_path()
    files = sorted(path.glob(f"{PREFIX}*.json*")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: expected files {PREFIX}*.json")
    samples = [sample for file in files for sample in _read(file, source)]
    return choose(samples, source.limit, source.seed)


def _read(file: Path, source: Source) -> Iterator[Sample]:
    category = file.stem.removeprefix(PREFIX)
    rows = list(read_json_lines(file, _Question))
    images = checked_images(source.image_path(row.image) for row in rows)
    for row, image in zip(rows, images, strict=True):
        yield Sample(f"{category}/{row.question_id}", f"{row.text}{SHORT_ANSWER}", image, (row.label,), category)


def parse(text: str) -> str:
    """``no`` if the first sentence has the word no or not, else ``yes``."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score(sample: Sample, text: str) -> float:
    """Whether the answer is the label."""
    return float(parse(text) == sample.expected[0])


def figures(scored: Sequence[Scored]) -> dict[str, float]:
    """Precision, recall and F1 of yes, and the share of yes; a failed request counts as the wrong answer."""
    right_yes = sum(one.score for one in scored if one.sample.expected == ("yes",))
    wrong_no = sum(1 - one.score for one in scored if one.sample.expected == ("yes",))
    wrong_yes = sum(1 - one.score for one in scored if one.sample.expected == ("no",))
    precision = _share(right_yes, wrong_yes)
    recall = _share(right_yes, wrong_no)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": (right_yes + wrong_yes) / len(scored),
    }


def _share(part: float, rest: float) -> float:
    return part / (part + rest) if part + rest else 0.0


TASK = Task(load, score, max_tokens=16, figures=figures)
