"""A child process that answers one JSON line with one; its other output goes to a log, which stays if it failed."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

NO_PLUGINS = {"VLLM_PLUGINS": ""}  # for stock vLLM: ours is installed beside it and would be loaded
OVERRIDES = ("VLLM_CPU_KVCACHE_SPACE",)  # vLLM puts these over given settings, which both engines must have


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's variables without :data:`OVERRIDES`, and ``more``."""
    return {name: value for name, value in os.environ.items() if name not in OVERRIDES} | dict(more)


def serve_lines(first: Callable[[dict[str, Any]], dict[str, Any]], rest: Callable[[dict[str, Any]], Any]) -> None:
    """The child's loop: answer the first line by ``first``, every other by ``rest``, until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = first
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()
        answer = rest


class PipedProcess:
    """The parent's side of ``python -m module``."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        handle, name = tempfile.mkstemp(prefix="hidrop-bench-", suffix=".log")
        self.log = Path(name)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=handle,
            text=True,
            env=child_environment(environment),
        )
        os.close(handle)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a line and receive one. Raises ValueError: the child ended; names its last words and its log."""
        self.send(message)
        return self.receive()

    def send(self, message: dict[str, Any]) -> None:
        """Send one line to the child; raises as :meth:`ask`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ValueError(self._why_it_ended()) from None

    def receive(self) -> dict[str, Any]:
        """Receive one line from the child; raises as :meth:`ask`."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(self._why_it_ended())
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _why_it_ended(self) -> str:
        lines = self.log.read_text().strip().splitlines() or ["no output"]
        return f"the measured process ended: {lines[-1]} (log: {self.log})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        is_well = self.process.poll() is None
        if error is not None:
            self.process.kill()
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        if is_well or self.process.returncode == 0:
            self.log.unlink()
