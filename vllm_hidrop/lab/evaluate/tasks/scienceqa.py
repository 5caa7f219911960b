"""ScienceQA, questions with an image of the test split: accuracy of the option's letter.

**Source**: Lu et al. 2022, arXiv 2209.09513; prompt form of LLaVA-1.5, parsing as in LLaVA's ``eval_science_qa.py``.
**Format**: a folder with ``problems.json`` ``{"4": {"question": "..", "choices": [..], "answer": 0, "hint": "..",
"image": "image.png", "subject": ".."}}`` and ``pid_splits.json`` ``{"test": ["4"]}``; images ``ID/image.png`` in
``--images`` or in the folder's ``test``.
**Differs**: questions without an image are left out (LLaVA's IMG-Accuracy).
"""

import re
from typing import Self

from pydantic import BaseModel, Field, model_validator

from vllm_hidrop.lab.evaluate.reading import read_json
from vllm_hidrop.lab.evaluate.samples import LETTER_ANSWER, Sample, Source, Task, checked_images, choose

SPLIT = "test"
LETTERS = "ABCDE"
SAID = re.compile(r"The answer is ([A-E])")


class _Problem(BaseModel):
    question: str
    choices: tuple[str, ...] = Field(max_length=len(LETTERS))
    answer: int
    hint: str
    image: str | None
    subject: str = "all"

    @model_validator(mode="after")
    def _has_its_answer(self) -> Self:
        if self.answer not in range(len(self.choices)):
            raise ValueError("expected the index of a choice as answer")
        return self

    def prompt(self) -> str:
        """Hint, question and lettered choices."""
        hint = f"Context: {self.hint}\n" if self.hint else ""
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return f"{hint}{self.question}\n{choices}{LETTER_ANSWER}"


def load(source: Source) -> list[Sample]:
    """The image subset of the test split; ValueError: wrong format or a missing file."""
    folder = source.data_path()
    file = folder / "problems.json"
    problems = read_json(file, dict[str, _Problem])
    names = read_json(folder / "pid_splits.json", dict[str, list[str]]).get(SPLIT, [])
    if missing := [name for name in names if name not in problems]:
        raise ValueError(f"{file}: expected problem {missing[0]} of split {SPLIT}")
    shown = {name: problems[name] for name in names if problems[name].image}
    root = source.images or folder / SPLIT
    images = checked_images(root / name / str(problem.image) for name, problem in shown.items())
    samples = [
        Sample(name, one.prompt(), image, (LETTERS[one.answer],), one.subject, options=one.choices)
        for (name, one), image in zip(shown.items(), images, strict=True)
    ]
    return choose(samples, source.limit, source.seed)


def parse(text: str) -> str | None:
    """The letter said: alone, before a full stop and space at the start, or after "The answer is"."""
    text = text.replace("\n", ". ")
    if text.strip() in tuple(LETTERS):
        return text.strip()
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return text[0]
    found = SAID.search(text)
    return found.group(1) if found else None


def score(sample: Sample, text: str) -> float:
    """Whether the letter said is the right one."""
    return float(parse(text) == sample.expected[0])


TASK = Task(load, score, max_tokens=64)
