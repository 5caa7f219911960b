"""Files and directories that appear whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def unfinished_path(path: Path) -> Path:
    """The hidden neighbour that holds the content of ``path`` until it is complete."""
    return path.with_name(f".{path.name}.unfinished")


@contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Yields a neighbour of ``path`` to write a file or directory to; without an error it becomes ``path``.

    After an error the neighbour is removed. A leftover of an earlier run is removed first, never written through: it
    may be a link. A file is on disk before it is renamed. Raises OSError; of a full disk, its message says what to do.
    """
    unfinished = unfinished_path(path)
    _remove(unfinished)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        if unfinished.is_dir():
            _remove(path)
        else:
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        _remove(unfinished)
        if _is_disk_full(error):
            what_to_do = "what was finished before is intact: make room and run the same command again"
            raise OSError(errno.ENOSPC, f"disk full while writing {path}; {what_to_do}") from error
        raise


def _is_disk_full(error: BaseException) -> bool:
    """Whether the disk was full; safetensors and PyTorch wrap the system's error in their own."""
    return (isinstance(error, OSError) and error.errno in DISK_FULL) or "No space left on device" in str(error)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_or_absent(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
