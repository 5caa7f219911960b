"""Files and folders a command writes at its end: checked at its start, made with missing parents, or replaced."""

import errno
import os
import stat
import tempfile
from pathlib import Path


def check_file(path: Path) -> None:
    """Check, making nothing, that a file can be written. Raises OSError: names the path, or the folder at fault."""
    if not path.exists():
        _check_place(path)
    elif not stat.S_ISFIFO(path.stat().st_mode):  # opening a pipe waits for its reader
        with path.open("ab"):
            pass


def check_folder(path: Path) -> None:
    """Check, making nothing, that files can be written into a folder. Raises OSError: names the folder at fault."""
    _check_place(path / "file")


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file, and missing folders above it. Raises OSError: names the path."""
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is told without it
        raise


def _check_place(path: Path) -> None:
    """Make a temporary file in the nearest existing folder above: nothing else tells whether one can be made."""
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    try:
        with tempfile.NamedTemporaryFile(dir=above, prefix=".hidrop-"):
            pass
    except OSError as error:
        raise OSError(error.errno, f"no file can be made in it: {error.strerror}", str(above)) from None
