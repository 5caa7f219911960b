"""MME, pairs of yes and no questions about one image: accuracy plus accuracy+ per subtask, two totals.

**Source**: Fu et al. 2023, arXiv 2306.13394; parsing as in the official ``calculation.py``.
**Format**: a folder of ``SUBTASK.txt`` with lines ``image.jpg<TAB>question<TAB>Yes``, the two questions of an image on
following lines (the official ``eval_tool/Your_Results`` before a model's column is added); images in
``--images/SUBTASK/`` or ``--images/SUBTASK/images/``.
**Differs**: the question's own " Please answer yes or no." gives way to LLaVA's ending, as in LLaVA's evaluation.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_hidrop.lab.evaluate.reading import read_text
from vllm_hidrop.lab.evaluate.samples import SHORT_ANSWER, Sample, Scored, Source, Task, checked_images, choose

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
OWN_ENDING = " Please answer yes or no."
NUM_FIELDS = 3


def load(source: Source) -> list[Sample]:
    """All subtasks that have a file; ValueError: wrong format, an unknown subtask, or a missing file."""
    folder = source.data_path()
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ValueError(f"{folder}: expected files SUBTASK.txt, for example existence.txt")
    samples = [sample for file in files for sample in _read(file, source)]
    return choose(samples, source.limit, source.seed)


def _read(file: Path, source: Source) -> Iterator[Sample]:
    subtask = file.stem
    if subtask not in PERCEPTION + COGNITION:
        raise ValueError(f"{file}: unknown subtask; known: {', '.join(PERCEPTION + COGNITION)}")
    rows = list(_rows(file))
    for (number, first), (_, second) in zip(rows[::2], rows[1::2], strict=False):
        if first[0] != second[0]:
            raise ValueError(f"{file}, line {number}: expected two lines about {first[0]}, got {second[0]}")
    if len(rows) % 2:
        raise ValueError(f"{file}, line {rows[-1][0]}: expected a second line about {rows[-1][1][0]}")
    images = checked_images(_image(source, subtask, name) for _, (name, _, _) in rows)
    for index, ((_, (_, question, answer)), image) in enumerate(zip(rows, images, strict=True)):
        text = question.replace(OWN_ENDING, "") + SHORT_ANSWER
        group = f"{subtask}/{index // 2}"
        yield Sample(f"{group}/{index % 2}", text, image, (answer,), subtask, group=group)


def _rows(file: Path) -> Iterator[tuple[int, tuple[str, str, str]]]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            fields = line.rstrip("\r").split("\t")
            answer = fields[-1].strip().lower()
            if len(fields) != NUM_FIELDS or answer not in ("yes", "no"):
                raise ValueError(f"{file}, line {number}: expected image, question and Yes or No between tabs")
            yield number, (fields[0], fields[1], answer)


def _image(source: Source, subtask: str, name: str) -> Path:
    below = source.image_path(subtask) / "images" / name
    return below if below.is_file() else source.image_path(subtask) / name


def parse(text: str) -> str:
    """Yes or no if one is within the first four characters, else "other"."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(sample: Sample, text: str) -> float:
    """Whether the answer is the expected one."""
    return float(parse(text) == sample.expected[0])


def figures(scored: Sequence[Scored]) -> dict[str, float]:
    """Per subtask 100 x (accuracy + share of images with both right), at most 200; two totals sum the subtasks."""
    pairs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in scored:
        pairs[one.sample.type][one.sample.group].append(one.score)
    result: dict[str, float] = {}
    for subtask, by_image in pairs.items():
        scores = [score for both in by_image.values() for score in both]
        acc = 100 * sum(scores) / len(scores)
        acc_plus = 100 * sum(all(both) for both in by_image.values()) / len(by_image)
        result |= {f"{subtask}/acc": acc, f"{subtask}/acc_plus": acc_plus, f"{subtask}/score": acc + acc_plus}
    for total, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        result[total] = sum(result.get(f"{subtask}/score", 0.0) for subtask in subtasks)
    return result


TASK = Task(load, score, max_tokens=16, figures=figures)
