"""TextVQA, reading in natural images: VQA accuracy over ten human answers.

**Source**: Singh et al. 2019, arXiv 1904.08920; the rule of LLaVA's ``m4c_evaluator.py`` (MMF's).
**Format**: ``TextVQA_0.5.1_val.json`` ``{"data": [{"question_id": 1, "image_id": "a", "question": "..", "answers":
[ten strings]}]}``; images ``IMAGEID.jpg`` in ``--images`` (the official ``train_images``).
**Differs**: LLaVA-1.5's published figure adds OCR tokens to the prompt, which this file does not hold; here none.
"""

from pydantic import BaseModel, Field

from vllm_hidrop.lab.evaluate.answer_form import normalised
from vllm_hidrop.lab.evaluate.reading import read_json
from vllm_hidrop.lab.evaluate.samples import SHORT_ANSWER, Sample, Source, Task, checked_images, choose

NUM_ANSWERS = 10


class _Question(BaseModel):
    question_id: int | str
    image_id: str
    question: str
    answers: tuple[str, ...] = Field(min_length=NUM_ANSWERS, max_length=NUM_ANSWERS)


class _File(BaseModel):
    data: list[_Question]


def load(source: Source) -> list[Sample]:
    """All questions of the file; ValueError: wrong format or a missing file."""
    rows = read_json(source.data_path(), _File).data
    images = checked_images(source.image_path(f"{row.image_id}.jpg") for row in rows)
    samples = [
        Sample(str(row.question_id), f"{row.question}{SHORT_ANSWER}", image, row.answers, "all")
        for row, image in zip(rows, images, strict=True)
    ]
    return choose(samples, source.limit, source.seed)


def score(sample: Sample, text: str) -> float:
    """Leave one human out in turn: the mean of min(1, others who said the same / 3)."""
    said = normalised(text)
    agrees = [normalised(answer) == said for answer in sample.expected]
    same = sum(agrees)
    return sum(min(1.0, (same - agreed) / 3) for agreed in agrees) / len(agrees)


TASK = Task(load, score, max_tokens=32)
