"""The figures of every step, as CSV or for TensorBoard. Knows no training."""

import csv
from pathlib import Path
from typing import NamedTuple, Protocol

from vllm_hidrop.lab.train.saved_state import Progress


class StepFigures(NamedTuple):
    """One line of the log; ``stage`` counts from 0 and ``step`` from 1, ``tokens`` are valid rows of full prompts.

    ``mean_vision_tokens`` are those of an image that the schedule holds, mean over the layers.
    """

    stage: int
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    mean_vision_tokens: float = float("nan")


class RunLog(Protocol):
    """Takes figures in order."""

    def add(self, figures: StepFigures) -> None:
        """Note one step."""


class CsvLog:
    """``log.csv``; a resumed run first forgets the lines after its checkpoint."""

    def __init__(self, path: Path, done: Progress) -> None:
        lines = []
        if path.exists():
            with path.open(newline="") as file:
                lines = [line for line in csv.reader(file) if _is_before(line, done)]
        self._path = path
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([StepFigures._fields, *lines])

    def add(self, figures: StepFigures) -> None:
        """Append a line and leave it on disk."""
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow(figures)


def _is_before(line: list[str], done: Progress) -> bool:
    return len(line) == len(StepFigures._fields) and line[0].isdigit() and Progress(int(line[0]), int(line[1])) <= done


class TensorBoardLog:
    """Event files in ``tensorboard/``, one tag per stage and figure."""

    def __init__(self, directory: Path, done: Progress) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("log: tensorboard needs the package tensorboard (or use log: csv)") from None
        self._writer = SummaryWriter(directory, purge_step=done.step + 1 if done.step else None)

    def add(self, figures: StepFigures) -> None:
        """Write one value per figure."""
        for name, value in zip(figures._fields[2:], figures[2:], strict=True):
            self._writer.add_scalar(f"stage{figures.stage}/{name}", value, figures.step)
        self._writer.flush()


class NoLog:
    """What every process but the first writes to."""

    def add(self, figures: StepFigures) -> None:
        """Forget the figures."""


def open_log(kind: str, output: Path, done: Progress) -> RunLog:
    """The log of a run that goes on after ``done``."""
    output.mkdir(parents=True, exist_ok=True)
    return TensorBoardLog(output / "tensorboard", done) if kind == "tensorboard" else CsvLog(output / "log.csv", done)
