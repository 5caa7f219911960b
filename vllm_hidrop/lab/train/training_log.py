"""The figures of every training step, as CSV or for TensorBoard."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True, order=True)
class Progress:
    """How many steps of which stage are done."""

    stage: int
    step: int


class StepFigures(NamedTuple):
    """One line of the log; ``stage`` counts from 0 and ``step`` from 1, ``tokens`` are valid rows of full prompts.

    ``mean_vision_tokens`` are those of an image that the schedule keeps, mean over the layers.
    """

    stage: int
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    mean_vision_tokens: float = float("nan")


Log = Callable[[StepFigures], None]
"""Takes figures in order and leaves them on disk."""


def open_log(kind: str, output: Path, done: Progress) -> Log:
    """The log of a run that goes on after ``done``; lines logged after that point are dropped."""
    output.mkdir(parents=True, exist_ok=True)
    return (
        _tensorboard_log(output / "tensorboard", done) if kind == "tensorboard" else _csv_log(output / "log.csv", done)
    )


def _csv_log(path: Path, done: Progress) -> Log:
    lines = []
    if path.exists():
        with path.open(newline="") as file:
            lines = [line for line in csv.reader(file) if _is_before(line, done)]

    def write(mode: str, *rows: Iterable[object]) -> None:
        with path.open(mode, newline="") as file:
            csv.writer(file).writerows(rows)

    write("w", StepFigures._fields, *lines)
    return lambda figures: write("a", figures)


def _is_before(line: list[str], done: Progress) -> bool:
    return len(line) == len(StepFigures._fields) and line[0].isdigit() and Progress(int(line[0]), int(line[1])) <= done


def _tensorboard_log(directory: Path, done: Progress) -> Log:
    """Event files, one tag per stage and figure."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("log: tensorboard needs the package tensorboard (or use log: csv)") from None
    writer = SummaryWriter(directory, purge_step=done.step + 1 if done.step else None)

    def add(figures: StepFigures) -> None:
        for name, value in zip(figures._fields[2:], figures[2:], strict=True):
            writer.add_scalar(f"stage{figures.stage}/{name}", value, figures.step)
        writer.flush()

    return add
