"""Ctrl-C in commands that take long: one line, exit code 130, and nothing of theirs is left running."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.cli.command_line import COMMAND
from tests.cli.stub_server import stub_server
from tests.cli.test_ends import questions

TO_END_SECONDS = 60.0


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    """A command in a session of its own: only it gets the signal, as a supervisor sends it."""
    # What runs in the background ignores Ctrl-C, and so would what it starts.
    command = ["env", "--default-signal=INT", *COMMAND, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | variables,
    )


def interrupt(process: subprocess.Popen[str], times: int = 1) -> None:
    """Ctrl-C, and see how it ends."""
    children = psutil.Process(process.pid).children(recursive=True)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, told = process.communicate(timeout=TO_END_SECONDS)
    assert process.returncode == 130, told
    assert told.rstrip().splitlines()[-1] == "hidrop: interrupted"
    assert "Traceback" not in told
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.mark.parametrize("name", ["demo", "eval", "loadtest", "monitor"])
def test_a_server_that_does_not_answer_keeps_no_command(name: str, tmp_path: Path) -> None:
    with stub_server(answers=False) as stub:
        arguments: dict[str, tuple[object, ...]] = {
            "demo": ("--examples", questions(tmp_path)),
            "eval": ("--limit", 7, "--out", tmp_path / "answers"),
            "loadtest": ("smoke", "--out", tmp_path),
            "monitor": ("--png", tmp_path / "a.png"),
        }
        process = start(name, *arguments[name], "--url", stub.url)
        if name == "monitor":  # its Prometheus is asked for first
            time.sleep(5)
        else:
            assert stub.asked.wait(60)
        interrupt(process)


@pytest.mark.server
@pytest.mark.parametrize("command", [("demo",), ("eval", "--embedded"), ("loadtest", "smoke")], ids=" ".join)
def test_the_server_that_a_command_started_ends_with_it(command: tuple[str, ...]) -> None:
    """Interrupted twice, as people do, while the server starts."""
    process = start(*command)
    deadline = time.monotonic() + 120
    while not psutil.Process(process.pid).children(recursive=True):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    interrupt(process, times=3)


@pytest.mark.engine
def test_a_measurement_ends_with_its_processes(tmp_path: Path) -> None:
    process = start("bench", "prefill", "--shape", "tiny", "--eager", "--runs", 1, XDG_CACHE_HOME=str(tmp_path))
    deadline = time.monotonic() + 120
    while len(psutil.Process(process.pid).children(recursive=True)) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(2)
    interrupt(process)


def test_an_interrupted_start_of_a_server_is_one_line() -> None:
    process = start("serve", "--port", 0, "--host", "127.0.0.1")
    time.sleep(4)
    interrupt(process)
