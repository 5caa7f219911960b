"""A server as a child process that never outlives its parent's work: ours, stock vLLM's, a Prometheus."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.progress import Progress

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
    """Start ``hidrop serve``, or another server with its flags and ``/health``, on a free loopback port; its address.

    Arguments and errors as :func:`answering`.
    """
    url = f"http://{LOOPBACK}:{free_port()}"
    place = ["--host", LOOPBACK, "--port", url.rpartition(":")[2]]
    with answering("the server", [*command, *arguments, *place], f"{url}/health", on_wait, environment):
        yield url


@contextmanager
def asked_server(url: str | None, progress: Progress) -> Iterator[str]:
    """The server at an address; without one, ours with the embedded model, and a bar that moves until it answers."""
    if url is not None:
        yield url
        return
    task = progress.add_task("starting the server", total=None)
    with local_server([], on_wait=progress.refresh) as own:
        progress.remove_task(task)
        yield own


@contextmanager
def answering(
    name: str,
    command: Sequence[str],
    url: str,
    on_wait: Callable[[], None],
    environment: Mapping[str, str] | None = None,
    seconds: float = START_SECONDS,
) -> Iterator[None]:
    """Start a program, wait until an address answers, end its whole process group; its log stays if that fails.

    Args:
        name: what to call it.
        command: with its arguments.
        url: answered by 200 once it is ready.
        on_wait: called a few times a second until then.
        environment: its variables (default: those of this process).
        seconds: until it must be ready.

    Raises:
        ValueError: it ended, or did not answer in time; says why and where its log is.
    """
    with tempfile.NamedTemporaryFile("w+b", prefix="hidrop-server-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        old_handler = signal.signal(signal.SIGTERM, _end)
        try:
            deadline = time.monotonic() + seconds
            while not _is_ready(url):
                if process.poll() is not None:
                    raise ValueError(f"{name} ended while starting: {_last_line(log)}; its log: {log.name}")
                if time.monotonic() > deadline:
                    raise ValueError(f"{name} did not answer in {seconds:.0f} s; its log: {log.name}")
                on_wait()
                time.sleep(0.2)
            yield
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


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _last_line(log: IO[bytes]) -> str:
    lines = Path(log.name).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _end(number: int, frame: object) -> None:
    """A SIGTERM unwinds the stack, so that the server is ended too."""
    raise SystemExit(128 + number)
