"""GQA, compositional questions about scenes: exact match.

**Source**: Hudson and Manning 2019, arXiv 1902.09506; answers in the form of LLaVA's ``convert_gqa_for_eval.py``: lower
case, no full stop at the end.
**Format**: ``testdev_balanced_questions.json`` ``{"201307251": {"imageId": "n161313", "question": "..", "answer": "..",
"types": {"structural": "query"}}}``; images ``IMAGEID.jpg`` in ``--images``.
"""

from typing import Any

from pydantic import BaseModel

from vllm_hidrop.lab.evaluate.reading import read_json
from vllm_hidrop.lab.evaluate.samples import SHORT_ANSWER, Sample, Source, Task, checked_images, choose


class _Question(BaseModel):
    imageId: str
    question: str
    answer: str
    types: dict[str, Any] | None = None


def load(source: Source) -> list[Sample]:
    """All questions of the file; types are the official structural ones. ValueError: wrong format or a missing file."""
    rows = read_json(source.data_path(), dict[str, _Question])
    images = checked_images(source.image_path(f"{row.imageId}.jpg") for row in rows.values())
    samples = []
    for (name, row), image in zip(rows.items(), images, strict=True):
        kind = (row.types or {}).get("structural") or "all"
        samples.append(Sample(name, f"{row.question}{SHORT_ANSWER}", image, (row.answer,), kind))
    return choose(samples, source.limit, source.seed)


def score(sample: Sample, text: str) -> float:
    """Exact match in the form of LLaVA's conversion."""
    return float(text.strip().rstrip(".").lower() == sample.expected[0])


TASK = Task(load, score, max_tokens=16)
