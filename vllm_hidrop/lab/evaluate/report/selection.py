"""How far the kept patches of one checkpoint move between float32 and bfloat16, on the same questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tqdm import tqdm

from vllm_hidrop.lab.evaluate.endpoint import Answer, Endpoint, ask_all
from vllm_hidrop.lab.evaluate.exam import Exam
from vllm_hidrop.lab.evaluate.report.rows import Row, float32_rows, shipped_rows
from vllm_hidrop.lab.evaluate.report.serving import server
from vllm_hidrop.lab.evaluate.samples import Sample

EXPLAINS = {"hidrop_explain": 1}
COMPARED = {"shipped/hidrop", "float32/hidrop"}


@dataclass(frozen=True)
class Kept:
    """The answer to one request, and the patches it kept at every cut, by the cut's first layer."""

    patches: Mapping[int, frozenset[int]]
    answer: str


def kept_of(report: Mapping[str, Any], answer: str) -> Kept:
    """What a report says was kept; its request had one image and asked for ``patches``."""
    patches: dict[int, frozenset[int]] = {}
    before = None
    for stage in report["stages"]:
        (now,) = stage["patches"]
        if before and 0 < len(now) < len(before):
            patches[stage["first_layer"]] = frozenset(now)
        before = now
    return Kept(patches, answer)


def served_sets(exam: Exam, row: Row) -> list[Kept]:
    """What a row's server keeps for each question; ValueError: no start, no report, or a failed request."""
    found: dict[str, Kept] = {}
    with server(row.arm()) as url, tqdm(total=len(exam.samples), desc=row.name, mininterval=5) as bar:

        def keep(sample: Sample, answer: Answer) -> None:
            if answer.report is None or answer.text is None:
                raise ValueError(answer.error or f"{row.name} gives no report")
            found[sample.id] = kept_of(answer.report, answer.text)
            bar.update()

        ask_all(Endpoint(url, xargs=EXPLAINS), exam.samples, exam.task.max_tokens, exam.concurrency, keep)
    return [found[sample.id] for sample in exam.samples]


def moved(exact: Sequence[Kept], rounded: Sequence[Kept]) -> dict[str, Any]:
    """Shares of requests with the same sets and answers, and mean Jaccard indices, by cut and over all cuts."""

    def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
        return len(one & other) / len(one | other)

    pairs = list(zip(exact, rounded, strict=True))
    cuts = [
        {
            "layer": layer,
            "kept": fmean(len(one.patches[layer]) for one in exact),
            "identical": fmean(one.patches[layer] == other.patches[layer] for one, other in pairs),
            "jaccard": fmean(jaccard(one.patches[layer], other.patches[layer]) for one, other in pairs),
        }
        for layer in exact[0].patches
    ]
    return {
        "questions": len(pairs),
        "cuts": cuts,
        "identical": fmean(one.patches == other.patches for one, other in pairs),
        "jaccard": fmean(each["jaccard"] for each in cuts),
        "same_answers": fmean(one.answer == other.answer for one, other in pairs),
    }


def measure(exam: Exam) -> dict[str, Any]:
    """The figures of the shipped HiDrop checkpoint; errors as of :func:`served_sets`."""
    exact, rounded = (row for row in (*float32_rows(), *shipped_rows()) if row.name in COMPARED)
    return {"row": rounded.name, "against": exact.name} | moved(served_sets(exam, exact), served_sets(exam, rounded))
