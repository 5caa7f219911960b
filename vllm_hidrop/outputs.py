"""Files and folders that a command writes when its work is done, checked before the work starts.

One rule for all: missing folders above them are made when they are written, not before; what is there is replaced.
"""

import errno
import os
import stat
import tempfile
from pathlib import Path


def check_file(path: Path) -> None:
    """See that a file can be written there; nothing is made, and what is there stays.

    Raises:
        OSError: it cannot; names the path, or the folder above it that is the reason.
    """
    if not path.exists():
        _check_place(path)
    elif not stat.S_ISFIFO(path.stat().st_mode):  # opening a pipe waits for its reader
        with path.open("ab"):
            pass


def check_folder(path: Path) -> None:
    """See that files can be written in a folder of that name; nothing is made.

    Raises:
        OSError: they cannot; names the path, or the folder above it that is the reason.
    """
    _check_place(path / "file")


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file, and the folders above it.

    Raises:
        OSError: it cannot be written; names the path.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is told without it
        raise


def _check_place(path: Path) -> None:
    """Try the nearest folder above the path that is there: only a file made in it tells whether one can be made."""
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    try:
        with tempfile.NamedTemporaryFile(dir=above, prefix=".hidrop-"):
            pass
    except OSError as error:
        raise OSError(error.errno, f"no file can be made in it: {error.strerror}", str(above)) from None
