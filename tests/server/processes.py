"""The processes of a server under test: which one answers HTTP, what it holds, what it logs."""

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import psutil


def api_process(url: str) -> psutil.Process:
    """The child of this process that listens on the port of ``url``."""
    port = int(url.rpartition(":")[2])
    for process in psutil.Process().children(recursive=True):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                return process
    raise LookupError(f"nobody listens on {port}")


def log_file(process: psutil.Process) -> Path:
    """The file that its output goes to."""
    return Path(f"/proc/{process.pid}/fd/1").resolve()


def exit_code(process: psutil.Process, seconds: float = 90.0) -> int:
    """Of a child of this process that was told to end; asks again and again, because pidfd is not to be had everywhere.

    Raises:
        TimeoutError: it lives on.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(process.pid, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    raise TimeoutError(f"{process} lives on")


def left(processes: Iterable[psutil.Process], seconds: float = 60.0) -> list[psutil.Process]:
    """Those that do not end by themselves in this time."""
    deadline = time.monotonic() + seconds
    while (alive := [each for each in processes if _lives(each)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def _lives(process: psutil.Process) -> bool:
    """Whether it still does something; what has ended and waits for its parent does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def held_mib(process: psutil.Process) -> float:
    """Memory held now."""
    return float(process.memory_info().rss) / (1 << 20)


def forget_peak(process: psutil.Process) -> None:
    """Let the peak start from what is held now."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")


def peak_mib(process: psutil.Process) -> float:
    """The most memory held since :func:`forget_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) / 1024
