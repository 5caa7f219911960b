"""Admit only grammars of bounded size that another process could compile in bounded time."""

import asyncio
import hashlib
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.cache import LRUCache

from hidrop_server.control.grammar_judge import MEMORY_MIB, question, serve_judge, wall_seconds
from hidrop_server.metrics import HidropMetrics

REMEMBERED = 4096  # verdicts kept
AT_ONCE = max(2, os.cpu_count() or 1)  # grammars tried at the same time; others wait
PARAMETER = "structured_outputs"

Verdict = dict[str, Any]


class Judge:
    """Starts the process of `grammar_judge`, and asks it.

    The process is a fork of the server's, made before that has threads or sockets: a new one would have to import vLLM.
    """

    def __init__(self, config: VllmConfig, seconds: int, inherited: Sequence[socket.socket] = ()) -> None:
        self.seconds = seconds
        self._control, theirs = socket.socketpair()
        self._process = multiprocessing.get_context("fork").Process(
            target=serve_judge,
            args=(theirs, (self._control, *inherited), config, seconds),
            name="GrammarJudge",
            daemon=True,
        )
        self._process.start()
        theirs.close()

    @property
    def lives(self) -> bool:
        """Whether the process still runs."""
        return self._process.is_alive()

    async def ask(self, asked: bytes) -> bytes:
        """The verdict as JSON, empty if the child was ended before it had one; OSError if the judge has ended."""
        ours, its = socket.socketpair()
        with its:
            try:
                socket.send_fds(self._control, [b"?"], [its.fileno()])
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            writer.write(asked)
            writer.write_eof()
            return await reader.read()
        finally:
            writer.close()

    def end(self) -> None:
        """End the process; its children end by themselves."""
        self._control.close()
        self._process.join(1)
        if self._process.is_alive():
            self._process.kill()


class Grammars:
    """Admits constraints of at most ``max_kb`` KiB of text that compile in time and can be spelt in tokens."""

    def __init__(self, judge: Judge, max_kb: int, metrics: HidropMetrics) -> None:
        self._judge = judge
        self._max_kb = max_kb
        self._metrics = metrics
        self._verdicts: LRUCache[bytes, Verdict] = LRUCache(REMEMBERED)
        self._asking: dict[bytes, asyncio.Task[Verdict]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)

    @property
    def why_unready(self) -> str | None:
        """Why no constraint can be admitted any more; None while the judge's process runs."""
        return None if self._judge.lives else "the process that tries grammars has ended: restart this server"

    async def admit(self, params: SamplingParams, stop_token_ids: Sequence[int]) -> None:
        """Wait for the verdict, and write into ``params`` what vLLM's own validation would have.

        Raises:
            VLLMValidationError: the constraint is too large, invalid, too slow to compile, or impossible in tokens.
            GracefulHTTPError: there is no verdict for now (503).
        """
        structured = params.structured_outputs
        if structured is None or structured.all_constraints_none():
            return
        num_bytes = _size(structured)
        if num_bytes > self._max_kb << 10:
            self._refuse(
                f"the grammar, schema, pattern or choices are {num_bytes >> 10} KiB large, "
                f"over {self._max_kb} KiB (--max-grammar-kb)"
            )
        asked = question(structured, stop_token_ids)
        verdict = await self._verdict(asked)
        if "refused" in verdict:
            self._refuse(verdict["refused"])
        if verdict["grammar"] is not None:
            structured.choice, structured.grammar = None, verdict["grammar"]
        structured._backend = verdict["backend"]

    async def _verdict(self, asked: bytes) -> Verdict:
        key = hashlib.sha256(asked).digest()
        if key in self._verdicts:
            return self._verdicts[key]
        if key not in self._asking:
            task = asyncio.ensure_future(self._ask(asked))
            self._asking[key] = task
            self._metrics.grammars_wait(len(self._asking))
            task.add_done_callback(lambda done: self._remember(key, done))
        return await asyncio.shield(self._asking[key])  # others may wait for it, too

    async def _ask(self, asked: bytes) -> Verdict:
        seconds = self._judge.seconds
        limit = wall_seconds(seconds)
        try:
            async with asyncio.timeout(limit):
                await self._slots.acquire()
        except TimeoutError:
            raise _busy() from None
        began = time.monotonic()
        try:
            said = await self._judge.ask(asked)
        except OSError:
            raise _busy() from None
        finally:
            self._slots.release()
        if said:
            verdict: Verdict = json.loads(said)
            return verdict
        if time.monotonic() - began >= limit - 0.5 or not self._judge.lives:
            raise _busy()
        return {
            "refused": f"compiling the grammar takes more than {seconds} s of CPU time (--max-grammar-seconds) "
            f"or {MEMORY_MIB} MiB"
        }

    def _remember(self, key: bytes, done: "asyncio.Task[Verdict]") -> None:
        del self._asking[key]
        self._metrics.grammars_wait(len(self._asking))
        with suppress(GracefulHTTPError, asyncio.CancelledError):
            self._verdicts[key] = done.result()

    def _refuse(self, why: str) -> None:
        self._metrics.refused("grammar")
        raise VLLMValidationError(why, parameter=PARAMETER)


def _size(structured: StructuredOutputsParams) -> int:
    """Bytes of the constraint as UTF-8 text."""
    given = (structured.json, structured.regex, structured.choice, structured.grammar, structured.structural_tag)
    texts = [each if isinstance(each, str) else json.dumps(each) for each in given if each is not None]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def _busy() -> GracefulHTTPError:
    return GracefulHTTPError("this server has no time to compile a grammar now", HTTPStatus.SERVICE_UNAVAILABLE)
