"""MMBench, multiple choice: vanilla accuracy of the option's letter.

**Source**: Liu et al. 2023, arXiv 2307.06281; prompt as in LLaVA's ``model_vqa_mmbench.py``.
**Format**: a tab-separated file with columns index, question, hint, A, B, C, D, answer, category, image; the image is
base64, or the index of the row that holds it.
**Differs**: CircularEval (all rotations of the options must be right) is not implemented, nor the language model that
reads answers without a letter: any answer but a letter or an option's whole text is wrong. Figures compare settings of
one server, but not with a leaderboard's.
"""

import base64
import binascii
import re
from functools import partial
from typing import Self

from pydantic import BaseModel, model_validator

from vllm_hidrop.lab.evaluate.reading import read_table
from vllm_hidrop.lab.evaluate.samples import LETTER_ANSWER, Sample, Source, Task, choose

LETTERS = "ABCD"
ABSENT = ("", "nan", "none")
SAID = re.compile(r"^\(?([A-D])(?:[).:,\s]|$)")


class _Row(BaseModel):
    index: str
    question: str
    hint: str
    A: str
    B: str
    C: str
    D: str
    answer: str
    category: str
    image: str

    @property
    def options(self) -> tuple[str, ...]:
        """The options that the row has, one to four."""
        return tuple(text for text in (self.A, self.B, self.C, self.D) if text.lower() not in ABSENT)

    @model_validator(mode="after")
    def _has_its_answer(self) -> Self:
        known = tuple(LETTERS[: len(self.options)])
        if self.answer.strip() not in known:
            raise ValueError(
                f"expected the letter of one of {len(known)} options as answer, got {self.answer.strip() or 'none'}"
            )
        return self

    def prompt(self) -> str:
        """Hint, question and lettered choices."""
        hint = "" if self.hint.lower() in ABSENT else f"{self.hint}\n"
        choices = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return f"{hint}{self.question}{choices}{LETTER_ANSWER}"


def load(source: Source) -> list[Sample]:
    """All rows of the file; ValueError: wrong format, an image that is not base64, or a missing file."""
    file = source.data_path()
    rows = list(read_table(file, _Row))
    images = {row.index: row.image for row in rows}
    samples = []
    for row in rows:
        encoded = images.get(row.image, row.image)
        try:
            base64.b64decode(encoded, validate=True)
        except binascii.Error:
            place = f"{file}, question {row.index}"
            raise ValueError(f"{place}: expected a base64 image or the index of a row that has one") from None
        image = partial(base64.b64decode, encoded)
        answer = (row.answer.strip(),)
        samples.append(Sample(row.index, row.prompt(), image, answer, row.category, row.options))
    return choose(samples, source.limit, source.seed)


def parse(options: tuple[str, ...], text: str) -> str | None:
    """The letter at the start, or that of the option whose text is the answer."""
    text = text.strip()
    found = SAID.match(text)
    if found:
        return found.group(1)
    said = text.rstrip(".").lower()
    return next((letter for letter, option in zip(LETTERS, options, strict=False) if option.lower() == said), None)


def score(sample: Sample, text: str) -> float:
    """Whether the letter said is the right one."""
    return float(parse(sample.options, text) == sample.expected[0])


TASK = Task(load, score, max_tokens=64)
