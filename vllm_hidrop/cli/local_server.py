"""Our server as a child process that never outlives its parent's work.

Knows the command line and `/health`; not what is asked of the server.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOOPBACK = "127.0.0.1"
COMMAND = (sys.executable, "-c", "from vllm_hidrop.cli.app import app; app()", "serve")
START_SECONDS = 600.0
STOP_SECONDS = 15.0


@contextmanager
def local_server(
    arguments: Sequence[str],
    on_wait: Callable[[], None],
    command: Sequence[str] = COMMAND,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Start the server on a free loopback port, yield its address, end its whole process group.

    Args:
        arguments: of ``command``.
        on_wait: called a few times a second until the server answers.
        command: ``hidrop serve``, or another server that takes ``--host`` and ``--port`` and has ``/health``.
        environment: its variables (default: those of this process).

    Raises:
        ValueError: the server ended, or did not answer in time; says why and where its log is.
    """
    port = free_port()
    with tempfile.NamedTemporaryFile("w+b", prefix="hidrop-server-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            [*command, *arguments, "--host", LOOPBACK, "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        old_handler = signal.signal(signal.SIGTERM, _end)
        try:
            url = f"http://{LOOPBACK}:{port}"
            _wait_until_healthy(url, process, log, on_wait)
            yield url
        finally:
            with _undisturbed():
                end_group(process)
            signal.signal(signal.SIGTERM, old_handler)
    Path(log.name).unlink()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not stop what the first one began: it would leave the server behind."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    old_handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, old_handlers, strict=True):
            signal.signal(number, handler)


def free_port() -> int:
    """A loopback port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End the server and the engine processes it started: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], log: IO[bytes], on_wait: Callable[[], None]
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _is_healthy(url):
        if process.poll() is not None:
            raise ValueError(f"the server ended while starting: {_last_line(log)}; its log: {log.name}")
        if time.monotonic() > deadline:
            raise ValueError(f"the server did not answer in {START_SECONDS:.0f} s; its log: {log.name}")
        on_wait()
        time.sleep(0.2)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


def _last_line(log: IO[bytes]) -> str:
    lines = Path(log.name).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _end(number: int, frame: object) -> None:
    """A SIGTERM unwinds the stack, so that the server is ended too."""
    raise SystemExit(128 + number)
