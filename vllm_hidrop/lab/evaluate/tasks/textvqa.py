"""TextVQA, reading in natural images: VQA accuracy over ten human answers.

**Source**: Singh et al. 2019, arXiv 1904.08920; the rule of LLaVA's ``m4c_evaluator.py`` (MMF's).
**Format**: ``TextVQA_0.5.1_val.json`` ``{"data": [{"question_id": 1, "image_id": "a", "question": "..", "answers":
[ten strings]}]}``; images ``IMAGEID.jpg`` in ``--images`` (the official ``train_images``).
**Differs**: LLaVA-1.5's published figure adds OCR tokens to the prompt, which this file does not hold; here none.
"""

from vllm_hidrop.lab.evaluate.answer_form import normalised
from vllm_hidrop.lab.evaluate.reading import has_fields, read_json
from vllm_hidrop.lab.evaluate.samples import SHORT_ANSWER, Sample, Source, Task, checked_images, choose, file_image

FIELDS = ("question_id", "image_id", "question", "answers")
NUM_ANSWERS = 10


def load(source: Source) -> list[Sample]:
    """All questions of the file.

    Raises:
        ValueError: wrong format or a missing file.
    """
    file = source.data_path()
    rows = has_fields(read_json(file), ("data",), str(file))["data"]
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected data to be a list of questions")
    samples = []
    for index, row in enumerate(rows):
        place = f"{file}, data[{index}]"
        has_fields(row, FIELDS, place)
        if not isinstance(row["answers"], list) or len(row["answers"]) != NUM_ANSWERS:
            raise ValueError(f"{place}: expected {NUM_ANSWERS} answers")
        image = file_image(source.image_path(f"{row['image_id']}.jpg"))
        question = f"{row['question']}{SHORT_ANSWER}"
        samples.append(Sample(str(row["question_id"]), question, image, tuple(map(str, row["answers"])), "all"))
    checked_images(source.image_path(f"{row['image_id']}.jpg") for row in rows)
    return choose(samples, source.limit, source.seed)


def score(sample: Sample, text: str) -> float:
    """Mean over leaving one human out of min(1, others who said the same / 3)."""
    said = normalised(text)
    agrees = [normalised(answer) == said for answer in sample.expected]
    same = sum(agrees)
    return sum(min(1.0, (same - agreed) / 3) for agreed in agrees) / len(agrees)


TASK = Task(load, score, max_tokens=32)
