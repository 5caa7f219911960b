"""MMBench, multiple choice: vanilla accuracy of the option's letter.

**Source**: Liu et al. 2023, arXiv 2307.06281; prompt as in LLaVA's ``model_vqa_mmbench.py``.
**Format**: a tab-separated file with columns index, question, hint, A, B, C, D, answer, category, image; the image is
base64, or the index of the row that holds it.
**Differs**: CircularEval (all rotations of the options must be right) is not implemented, nor the language model that
reads answers without a letter: a letter, or an option's whole text, is an answer, anything else is wrong. Both make
these figures incomparable with a leaderboard's; they compare settings of one server.
"""

import base64
import binascii
import re
from functools import partial

from vllm_hidrop.lab.evaluate.reading import read_table
from vllm_hidrop.lab.evaluate.samples import LETTER_ANSWER, Sample, Source, Task, choose

LETTERS = "ABCD"
COLUMNS = ("index", "question", "hint", *LETTERS, "answer", "category", "image")
ABSENT = ("", "nan", "none")
SAID = re.compile(r"^\(?([A-D])(?:[).:,\s]|$)")


def load(source: Source) -> list[Sample]:
    """All rows of the file.

    Raises:
        ValueError: wrong format, an image that is not base64, or a missing file.
    """
    file = source.data_path()
    rows = list(read_table(file, COLUMNS))
    images = {row["index"]: row["image"] for _, row in rows}
    samples = [_sample(row, images, f"{file}, line {number}") for number, row in rows]
    return choose(samples, source.limit, source.seed)


def _sample(row: dict[str, str], images: dict[str, str], place: str) -> Sample:
    options = tuple(row[letter] for letter in LETTERS if row[letter].lower() not in ABSENT)
    answer = row["answer"].strip()
    if answer not in tuple(LETTERS[: len(options)]):
        raise ValueError(
            f"{place}: expected the letter of one of {len(options)} options as answer, got {answer or 'none'}"
        )
    encoded = images.get(row["image"], row["image"])
    try:
        base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise ValueError(f"{place}: expected a base64 image or the index of a row that has one") from None
    image = partial(base64.b64decode, encoded)
    return Sample(row["index"], _prompt(row, options), image, (answer,), row["category"], options)


def _prompt(row: dict[str, str], options: tuple[str, ...]) -> str:
    hint = "" if row["hint"].lower() in ABSENT else f"{row['hint']}\n"
    choices = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{hint}{row['question']}{choices}{LETTER_ANSWER}"


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
