"""How every command ends: a mistake of user or system is one line on standard error, never a traceback.

Exit codes: 2 with such a line, 130 after Ctrl-C, 141 where the reader of a pipe left; others are the commands' own.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

MOST_CHARACTERS = 500  # of the line; some errors repeat all they were given
INTERRUPTED, READER_LEFT = 130, 141  # 128 and the number of the signal, as shells have it


class OneLineErrors(TyperGroup):
    """The group of all commands, those added later too: parsing, help and commands end in :func:`one_line_errors`."""

    def main(self, args: Any = None, *more: Any, **named: Any) -> Any:
        """Run the process's own command line, or the given one."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # where a terminal's encoding lacks a character, its number is shown
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(args, *more, **named)
        except SystemExit as end:
            if args is None and end.code == INTERRUPTED:  # told; an impatient second Ctrl-C changes nothing
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise

    def make_context(self, *args: Any, **more: Any) -> Any:
        """Read the options of ``hidrop`` itself; help is printed here."""
        with one_line_errors():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        """Read a command's options and run it."""
        with one_line_errors():
            return super().invoke(ctx)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report ValueError, OSError and Ctrl-C as one line, and a full standard output like any other full file."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # closed by the shell
                sys.stdout.flush()
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _give_up(sys.stdout)
        raise typer.Exit(READER_LEFT) from None
    except OSError as error:
        _give_up(sys.stdout)
        _say(_reason(error))
        raise typer.Exit(2) from None
    except ValueError as error:
        _say(str(error))
        raise typer.Exit(2) from None


def _reason(error: OSError) -> str:
    """Where and why an OSError happened, without its number."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}" if error.strerror else str(error) or type(error).__name__


def _say(text: str) -> None:
    line = " ".join(text.split())
    line = line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 1] + "…"
    with suppress(OSError):  # nobody can be told
        typer.echo(f"hidrop: {line}", err=True)


def _give_up(stream: TextIO) -> None:
    """Point a stream that cannot be written at /dev/null, for the interpreter's last flush of it."""
    with suppress(OSError, ValueError):
        stream.flush()
        return
    with suppress(OSError, ValueError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
