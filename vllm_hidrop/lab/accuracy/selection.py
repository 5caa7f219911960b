"""How far the kept patches of one checkpoint move between float32 and bfloat16: the same questions, served in both.

Knows reports and sets; no table.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tqdm import tqdm

from vllm_hidrop.cli.local_server import local_server
from vllm_hidrop.lab.accuracy.rows import Row, float32_rows, shipped_rows
from vllm_hidrop.lab.accuracy.served import offline
from vllm_hidrop.lab.evaluate.asking import Endpoint, reply_to
from vllm_hidrop.lab.evaluate.run import Exam

EXPLAINS = {"hidrop_explain": 1}
COMPARED = {"shipped/hidrop", "float32/hidrop"}
"""Names of the two rows."""


@dataclass(frozen=True)
class Kept:
    """What one request kept at every cut, by the cut's first layer, and its answer."""

    patches: Mapping[int, frozenset[int]]
    answer: str


def kept_of(report: Mapping[str, Any], answer: str) -> Kept:
    """The sets of a report whose request had one image and asked for them."""
    patches: dict[int, frozenset[int]] = {}
    before = None
    for stage in report["stages"]:
        (now,) = stage["patches"]
        if before and 0 < len(now) < len(before):
            patches[stage["first_layer"]] = frozenset(now)
        before = now
    return Kept(patches, answer)


def served_sets(exam: Exam, row: Row) -> list[Kept]:
    """What a row's server keeps for every question, in their order.

    Raises:
        ValueError: the server does not start, or gives no report.
        OpenAIError: a request failed.
    """
    offline()

    def ask(sample: Any) -> Kept:
        text, report = reply_to(endpoint, sample, exam.task.max_tokens)
        if report is None:
            raise ValueError(f"{row.name} gives no report")
        return kept_of(report, text)

    with local_server(row.arm.serve, on_wait=lambda: None) as url, ThreadPoolExecutor(exam.concurrency) as pool:
        endpoint = Endpoint(url, xargs=EXPLAINS)
        return list(tqdm(pool.map(ask, exam.samples), row.name, len(exam.samples), mininterval=5))


def moved(exact: Sequence[Kept], rounded: Sequence[Kept]) -> dict[str, Any]:
    """Shares of requests whose sets and answers are the same, and mean Jaccard indices, by cut and of all cuts."""
    pairs = list(zip(exact, rounded, strict=True))
    cuts = [
        {
            "layer": layer,
            "kept": fmean(len(one.patches[layer]) for one in exact),
            "identical": fmean(one.patches[layer] == other.patches[layer] for one, other in pairs),
            "jaccard": fmean(_jaccard(one.patches[layer], other.patches[layer]) for one, other in pairs),
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


def _jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)


def measure(exam: Exam) -> dict[str, Any]:
    """The figures of the shipped HiDrop checkpoint; see :func:`served_sets` for errors."""
    exact, rounded = (row for row in (*float32_rows(), *shipped_rows()) if row.name in COMPARED)
    return {"row": rounded.name, "against": exact.name} | moved(served_sets(exam, exact), served_sets(exam, rounded))
