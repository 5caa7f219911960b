"""What a user wrote on the command line, read or refused in one line.

The first half are callbacks of options: they are called before any command runs, so that no work is lost to a file
that cannot be written or an address that is none.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from vllm_hidrop.outputs import check_file, check_folder


def output_file(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """An option's file that is written at the end.

    Raises:
        ValueError: it cannot be written; names the option.
    """
    return _checked(check_file, param, path)


def output_folder(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """An option's folder that files are written into.

    Raises:
        ValueError: they cannot be; names the option.
    """
    return _checked(check_folder, param, path)


def _checked(check: Callable[[Path], None], param: typer.CallbackParam, path: Path | None) -> Path | None:
    try:
        if path is not None:
            check(path)
    except OSError as error:
        above = "" if error.filename == str(path) else f"{error.filename}: "
        raise ValueError(f"{param.opts[-1]} {path}: {above}{error.strerror}") from None
    return path


def server_address(param: typer.CallbackParam, value: str | None) -> str | None:
    """The address of a server that is asked.

    Raises:
        ValueError: it is none; names the option.
    """
    return None if value is None else parse_address(value, param.opts[-1])


def parse_address(text: str, option: str) -> str:
    """An address as :func:`hidrop_loadtests.addresses.parse_address` gives it.

    Raises:
        ValueError: it is none; names the option.
    """
    from hidrop_loadtests import addresses

    try:
        return addresses.parse_address(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def parse_counts(text: str, option: str, low: int, high: int) -> tuple[int, ...]:
    """Read comma-separated whole numbers, in order, each once.

    Raises:
        ValueError: something else, or a number out of range; the message names the option.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 and low <= int(part) <= high for part in parts):
        raise ValueError(f"{option} must be whole numbers from {low} to {high} like 1,2,4, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def parse_names(text: str, option: str, known: Sequence[str]) -> tuple[str, ...]:
    """Read comma-separated names, in order, each once.

    Raises:
        ValueError: an unknown name; the message names the option and the known ones.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in known:
            raise ValueError(f"{option}: unknown {part!r}; known: {', '.join(known)}")
    return tuple(dict.fromkeys(parts))
