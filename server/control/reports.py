"""Carry the engine's report from the outputs into the response."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

from vllm.outputs import RequestOutput

REPORT_KEY = "hidrop"  # of the report, in ``RequestOutput.kv_transfer_params`` and in the response
DATA = "data: "
DONE = f"{DATA}[DONE]\n\n"

Item = TypeVar("Item")


class ReportSeen:
    """Takes the report of the first choice out of one request's outputs."""

    def __init__(self, num_prompts: int = 1) -> None:
        self.report: dict[str, Any] | None = None
        self._num_running = num_prompts

    @property
    def finished(self) -> bool:
        """Whether every output has passed."""
        return self._num_running == 0

    def see(self, output: RequestOutput, prompt_index: int = 0) -> None:
        """Move the report from an output to ``report``: the response shows it once, under its own name."""
        params = output.kv_transfer_params or {}
        if REPORT_KEY in params:
            is_first = prompt_index == 0 and output.outputs[0].index == 0
            if is_first or self.report is None:
                self.report = params[REPORT_KEY]
            rest = {key: value for key, value in params.items() if key != REPORT_KEY}
            output.kv_transfer_params = rest or None
        self._num_running -= output.finished

    async def watch(self, outputs: AsyncIterator[Item]) -> AsyncGenerator[Item, None]:
        """Hand on the outputs of one prompt, or the (prompt index, output) pairs of several."""
        async for item in outputs:
            if isinstance(item, tuple):
                self.see(item[1], item[0])
            else:
                self.see(item)
            yield item


async def with_report(chunks: AsyncGenerator[str, None], seen: ReportSeen) -> AsyncGenerator[str, None]:
    """Put the report into the last chunk of a stream: that of the usage if there is one, else of the finish reason.

    No chunk is held back before the engine has finished. From vLLM 0.33 on, a message comes as its events.
    """
    held: str | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            if held is not None:
                yield _with_report(held, seen.report) if chunk == DONE else in_message_delta(held, seen.report)
                held = None
            if seen.finished and chunk != DONE:
                held = chunk
            else:
                yield chunk
    if held is not None:
        yield in_message_delta(held, seen.report)


def _with_report(chunk: str, report: dict[str, Any] | None) -> str:
    if report is None or not chunk.startswith(DATA):
        return chunk
    data = json.loads(chunk.removeprefix(DATA))
    if "choices" not in data:
        return chunk  # an error
    return f"{DATA}{_dump(data | {REPORT_KEY: report})}\n\n"


def report_in_chunk(chunk: str) -> dict[str, Any] | None:
    """The report that :func:`with_report` put into a chunk, if any."""
    if f'"{REPORT_KEY}":' not in chunk or not chunk.startswith(DATA):
        return None
    report: dict[str, Any] | None = json.loads(chunk.removeprefix(DATA)).get(REPORT_KEY)
    return report


def in_message_delta(event: str, report: dict[str, Any] | None) -> str:
    """Put the report into a messages stream's ``message_delta`` event, which has the usage."""
    head = f"event: message_delta\n{DATA}"
    if report is None or not event.startswith(head):
        return event
    return f"{head}{_dump(json.loads(event.removeprefix(head)) | {REPORT_KEY: report})}\n\n"


def _dump(data: dict[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":"))
