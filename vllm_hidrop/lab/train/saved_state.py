"""Checkpoints to resume from: the newest and the one before. Knows no training."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_hidrop.lab.train.unfinished import sync, whole_or_absent

NUM_KEPT = 2


@dataclass(frozen=True, order=True)
class Progress:
    """How many steps of which stage are done."""

    stage: int
    step: int


def path_of(directory: Path, progress: Progress) -> Path:
    """Names sort as their progress does."""
    return directory / f"stage{progress.stage:02d}-step{progress.step:09d}.pt"


def saved_paths(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(directory.glob("stage*-step*.pt"))


def save(directory: Path, progress: Progress, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all, then remove all but the newest two.

    Raises:
        OSError: the disk is full.
    """
    content = {"stage": progress.stage, "step": progress.step, **state}
    # A file of Python's, not a path: PyTorch's own writer hides the reason of a failure.
    with whole_or_absent(path_of(directory, progress)) as unfinished, unfinished.open("wb") as file:
        torch.save(content, file)
        file.flush()
        sync(file.fileno())
    for old in saved_paths(directory)[:-NUM_KEPT]:
        old.unlink()


def load_latest(directory: Path) -> dict[str, Any] | None:
    """The newest checkpoint, its tensors on the CPU, or None."""
    paths = saved_paths(directory)
    if not paths:
        return None
    state: dict[str, Any] = torch.load(paths[-1], map_location="cpu", weights_only=True)
    return state


def generator_states() -> dict[str, Any]:
    """States of the process's random generators, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(states: Mapping[str, Any]) -> None:
    """Undo everything drawn since :func:`generator_states`."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
