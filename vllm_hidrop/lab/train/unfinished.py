"""Files and directories that appear whole or not at all, and the reasons for which training stops."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; safetensors and PyTorch wrap the system's error in their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error)


@contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Yields a place beside ``path``; what is there afterwards becomes ``path``, after an error it is removed.

    Raises:
        OSError: what the system says; of a full disk, also what to do.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    _remove(unfinished)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        if unfinished.is_dir():
            _remove(path)
        unfinished.replace(path)
    except BaseException as error:
        _remove(unfinished)
        if is_disk_full(error):
            raise OSError(
                errno.ENOSPC,
                f"disk full while writing {path}; the unfinished file is removed, earlier checkpoints are intact: "
                "make room and run the same command again",
            ) from error
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(file_descriptor: int) -> None:
    """Wait until a file's content is on disk, so that a rename never precedes it."""
    os.fsync(file_descriptor)
