"""The families' checkpoints, each made once in a session when a test first asks for it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.families.checkpoints import CHECKPOINTS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family's name to the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("families")

    @cache
    def made(name: str) -> Path:
        directory = folder / name
        directory.mkdir()
        CHECKPOINTS[name].make(directory)
        return directory

    return made
