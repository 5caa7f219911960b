"""ScienceQA, questions with an image of the test split: accuracy of the option's letter.

**Source**: Lu et al. 2022, arXiv 2209.09513; prompt form of LLaVA-1.5, parsing as in LLaVA's ``eval_science_qa.py``.
**Format**: a folder with ``problems.json`` ``{"4": {"question": "..", "choices": [..], "answer": 0, "hint": "..",
"image": "image.png", "subject": ".."}}`` and ``pid_splits.json`` ``{"test": ["4"]}``; images ``ID/image.png`` in
``--images`` or in the folder's ``test``.
**Differs**: questions without an image are left out (LLaVA's IMG-Accuracy).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_hidrop.lab.evaluate.reading import has_fields, read_json
from vllm_hidrop.lab.evaluate.samples import LETTER_ANSWER, Sample, Source, Task, checked_images, choose, file_image

SPLIT = "test"
LETTERS = "ABCDE"
FIELDS = ("question", "choices", "answer", "hint", "image")
SAID = re.compile(r"The answer is ([A-E])")


def load(source: Source) -> list[Sample]:
    """The image subset of the test split.

    Raises:
        ValueError: wrong format or a missing file.
    """
    folder = source.data_path()
    file = folder / "problems.json"
    problems = has_fields(read_json(file), (), str(file))
    splits = has_fields(read_json(folder / "pid_splits.json"), (SPLIT,), str(folder / "pid_splits.json"))
    missing = [name for name in splits[SPLIT] if name not in problems]
    if missing:
        raise ValueError(f"{file}: expected problem {missing[0]} of split {SPLIT}")
    images = source.images or folder / SPLIT
    chosen = {name: has_fields(problems[name], FIELDS, f"{file}, problem {name}") for name in splits[SPLIT]}
    shown = {name: problem for name, problem in chosen.items() if problem["image"]}
    checked_images(images / name / str(problem["image"]) for name, problem in shown.items())
    return choose(list(_samples(shown, images, file)), source.limit, source.seed)


def _samples(problems: dict[str, dict[str, Any]], images: Path, file: Path) -> Iterator[Sample]:
    for name, problem in problems.items():
        choices, answer = problem["choices"], problem["answer"]
        is_list = isinstance(choices, list) and len(choices) <= len(LETTERS)
        if not is_list or answer not in range(len(choices)):
            raise ValueError(f"{file}, problem {name}: expected up to 5 choices and the index of one as answer")
        image = file_image(images / name / str(problem["image"]))
        kind = str(problem.get("subject", "all"))
        yield Sample(name, prompt(problem), image, (LETTERS[answer],), kind, options=tuple(map(str, choices)))


def prompt(problem: dict[str, Any]) -> str:
    """Hint, question and lettered choices."""
    hint = f"Context: {problem['hint']}\n" if problem["hint"] else ""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False))
    return f"{hint}{problem['question']}\n{choices}{LETTER_ANSWER}"


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
