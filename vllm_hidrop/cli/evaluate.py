"""``hidrop eval``: asks, scores and shows by `vllm_hidrop.lab.evaluate`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_hidrop.cli.local_server import local_server
from vllm_hidrop.lab.evaluate import exam as exams
from vllm_hidrop.lab.evaluate.endpoint import Endpoint
from vllm_hidrop.lab.evaluate.exam import Arm, Exam, Outcome, embedded_arms, provenance, take, take_arms
from vllm_hidrop.lab.evaluate.figure import draw_results
from vllm_hidrop.lab.evaluate.journal import check_journal
from vllm_hidrop.lab.evaluate.samples import Source
from vllm_hidrop.lab.evaluate.scoring import compare, mean_tokens, summarise
from vllm_hidrop.outputs import write_file
from vllm_hidrop.terminal import Terminal

OFF = {"hidrop": "off"}


@dataclass(frozen=True)
class Choice:
    """The questions and files, the same for both ways to run."""

    task: str
    source: Source
    concurrency: int
    json_file: Path | None
    out: Path | None

    def exam(self) -> Exam:
        """The questions. Raises ValueError: unknown task or unreadable data."""
        return Exam.load(self.task, self.source, self.concurrency)


def xargs(off: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """What ``--off`` and ``--xargs`` ask for together. Raises ValueError: both name ``hidrop``."""
    if off and "hidrop" in given:
        raise ValueError('give --off or "hidrop" in --xargs, not both')
    return {**given, **(OFF if off else {})}


def run_url(choice: Choice, endpoint: Endpoint) -> int:
    """Evaluate a server; returns 1 if a request failed, else 0. Raises ValueError: bad data, settings or endpoint."""
    exam, console = choice.exam(), Terminal()
    with progress_bars() as bars:
        outcome = take(exam, endpoint, choice.out, show_progress(bars, exam, Arm(exam.name)))
    result = {
        **exam.settings(endpoint),
        "url": endpoint.url,
        "limit": exam.source.limit,
        **summarise(exam.task, outcome.scored, outcome.answers, exam.source.seed),
        **provenance(),
    }
    return _end(console, _table(result), [outcome], choice.json_file, result)


def run_embedded(choice: Choice) -> int:
    """Serve and ask both checkpoints; returns as :func:`run_url`. Raises ValueError: bad data, or a server fails."""
    exam, console, arms = choice.exam(), Terminal(), embedded_arms(choice.out)
    for arm in arms:
        if arm.directory is not None:
            check_journal(arm.directory)
    with progress_bars() as bars:
        outcomes = list(take_arms(exam, arms, partial(_serving, bars), partial(show_progress, bars, exam)))
    result = _comparison(exam, outcomes)
    return _end(console, _comparison_table(result), outcomes, choice.json_file, result)


def run_plot(results: Sequence[Path], png: Path) -> None:
    """Plot result files. Raises ValueError: a file that is no result."""
    draw_results(results, png)
    Terminal().print(f"{png}: accuracy against vision tokens of {len(results)} result(s)", markup=False)


@contextmanager
def _serving(bars: Progress, arm: Arm) -> Iterator[str]:
    waiting = bars.add_task("starting the server", total=None)
    with local_server(arm.serve, on_wait=bars.refresh) as url:
        bars.remove_task(waiting)
        yield url


def show_progress(bars: Progress, exam: Exam, arm: Arm) -> exams.Progress:
    """A bar of the questions that an arm has answered."""
    bar = bars.add_task(arm.name, total=len(exam.samples))
    return exams.Progress(lambda num_answered: bars.update(bar, completed=num_answered), lambda: bars.advance(bar))


def _comparison(exam: Exam, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    dense, pruned = outcomes
    return {
        "task": exam.name,
        **compare(dense.scored, pruned.scored, exam.source.seed),
        "mean_vision_tokens": mean_tokens(pruned.answers.values()),
        "mean_vision_tokens_dense": mean_tokens(dense.answers.values()),
        "questions": len(exam.samples),
        "failed": {"dense": len(dense.failures), "hidrop": len(pruned.failures)},
        "seed": exam.source.seed,
        **provenance(),
    }


def _table(result: Mapping[str, Any]) -> Table:
    table = Table("Type", "Questions", "Accuracy", "95 % interval", title=f"{result['task']}: {result['model']}")
    for name, figures in (*result["by_type"].items(), ("all", result)):
        table.add_row(name, str(figures["questions"]), _percent(figures["accuracy"]), _between(figures["interval"]))
    tokens = result["mean_vision_tokens"]
    told = [f"vision tokens per layer: {'not reported' if tokens is None else f'{tokens:.1f}'}"]
    told += [f"{name} {value:.4g}" for name, value in result["figures"].items()]
    table.caption = ", ".join(told)
    return table


def _comparison_table(result: Mapping[str, Any]) -> Table:
    headings = ("Type", "Questions", "Dense", "HiDrop", "Retention", "95 % interval of retention")
    table = Table(*headings, title=f"{result['task']}: all vision tokens against the schedule's")
    for name, figures in (*result["by_type"].items(), ("all", result)):
        retention, interval = figures["retention"], figures["intervals"]["retention"]
        cells = (_percent(figures["dense"]), _percent(figures["hidrop"]), _percent(retention), _between(interval))
        table.add_row(name, str(figures["questions"]), *cells)
    tokens = (result["mean_vision_tokens_dense"], result["mean_vision_tokens"])
    shown = ["not reported" if one is None else f"{one:.1f}" for one in tokens]
    table.caption = f"vision tokens per layer: dense {shown[0]}, hidrop {shown[1]}"
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _between(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def progress_bars() -> Progress:
    """Bars on standard error that are gone at the end."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Terminal(stderr=True), transient=True)


def _end(
    console: Terminal, table: Table, outcomes: Sequence[Outcome], file: Path | None, result: Mapping[str, Any]
) -> int:
    """Show everything, then write; returns the exit code, 1 if a request failed."""
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    try:
        console.show(table)
        if failures:
            num_asked = sum(len(outcome.scored) for outcome in outcomes)
            text = f"{len(failures)} of {num_asked} requests failed and count as wrong: {failures[0]}"
            console.print(text, style="red", markup=False)
    finally:  # a reader that left does not cost the file
        if file is not None:
            write_file(file, json.dumps(result, indent=2) + "\n")
    return 1 if failures else 0
