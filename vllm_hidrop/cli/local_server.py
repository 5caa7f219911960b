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
    """Run ``hidrop serve`` (or ``command``) on a free loopback port, yield its address; raises as :func:`answering`."""
    url = f"http://{LOOPBACK}:{free_port()}"
    place = ["--host", LOOPBACK, "--port", url.rpartition(":")[2]]
    with answering("the server", [*command, *arguments, *place], f"{url}/health", on_wait, environment):
        yield url


@contextmanager
def asked_server(url: str | None, progress: Progress) -> Iterator[str]:
    """The server at ``url``; without one, ours with the embedded model, and a bar that moves until it answers."""
    if url is not None:
        yield url
        return
    task = progress.add_task("starting the server", total=None)
    with local_server([], on_wait=progress.refresh) as own:
        progress.remove_task(task)
        yield own


@contextmanager
def answering(
    name: str,  # for messages
    command: Sequence[str],
    url: str,  # answers 200 once the program is ready
    on_wait: Callable[[], None],  # called a few times a second until then
    environment: Mapping[str, str] | None = None,  # default: this process's
    seconds: float = START_SECONDS,  # until the program must be ready
) -> Iterator[None]:
    """Run a program around a block, then end its process group. Raises ValueError: it is not ready; names its log."""
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
    """Ignore a second Ctrl-C: it would interrupt the clean-up that the first began, and leave the server behind."""
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
    """End a process and the processes it started, by SIGTERM, then by SIGKILL."""
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
    """Unwind the stack at a SIGTERM, so that the server is ended too."""
    raise SystemExit(128 + number)
