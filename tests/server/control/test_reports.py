"""The report's way from the last output into a stream."""

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from hidrop_server.control.reports import DONE, ReportSeen, in_message_delta, report_in_chunk, with_report

REPORT = {"mode": "pruned"}


def output(report: dict[str, Any] | None, index: int = 0, finished: bool = False, **more: Any) -> Any:
    params = {"hidrop": report, **more} if report else None
    choices = [SimpleNamespace(index=index)]
    return SimpleNamespace(kv_transfer_params=params, outputs=choices, finished=finished)


def chunk(**data: Any) -> str:
    return f"data: {json.dumps(data)}\n\n"


def collect(chunks: list[str], finished_after: int, seen: ReportSeen) -> list[str]:
    """Send the chunks through; the last output passes before chunk number ``finished_after``."""

    async def send() -> AsyncGenerator[str, None]:
        for index, each in enumerate(chunks):
            if index == finished_after:
                seen.see(output(REPORT, finished=True))
            yield each

    async def run() -> list[str]:
        return [each async for each in with_report(send(), seen)]

    return asyncio.run(run())


def test_only_the_last_chunk_before_done_gets_the_report() -> None:
    chunks = [chunk(choices=[1]), chunk(choices=[2]), chunk(choices=[], usage={}), DONE]
    sent = collect(chunks, finished_after=1, seen=ReportSeen())
    assert sent[:2] == chunks[:2]
    assert json.loads(sent[2].removeprefix("data: ")) == {"choices": [], "usage": {}, "hidrop": REPORT}
    assert sent[3:] == [DONE]


def test_nothing_is_held_back_before_the_last_output() -> None:
    seen = ReportSeen()

    async def endless() -> AsyncGenerator[str, None]:
        yield "first"
        raise AssertionError("the first chunk was held back")

    async def first() -> str:
        stream = with_report(endless(), seen)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()

    assert asyncio.run(first()) == "first"


def test_an_error_at_the_end_stays_as_it_is() -> None:
    chunks = [chunk(choices=[1]), chunk(error={"message": "no"}), DONE]
    assert collect(chunks, finished_after=1, seen=ReportSeen()) == chunks


def test_a_stream_that_ends_early_loses_no_chunk() -> None:
    chunks = [chunk(choices=[1]), chunk(choices=[2])]
    assert collect(chunks, finished_after=1, seen=ReportSeen()) == chunks


def test_the_first_choice_wins_and_the_rest_of_the_parameters_stays() -> None:
    seen = ReportSeen()
    other = output({"mode": "off"}, index=1, remote="x")
    seen.see(other)
    assert seen.report == {"mode": "off"}
    assert other.kv_transfer_params == {"remote": "x"}
    first = output(REPORT, index=0, finished=True)
    seen.see(first)
    assert seen.report == REPORT
    assert first.kv_transfer_params is None
    assert seen.finished


def test_events_of_a_message_get_the_report_where_the_usage_is() -> None:
    """As vLLM 0.33 hands them on; 0.32 hands on chunks."""
    delta = 'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":3}}\n\n'
    stop = 'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    events = ["event: message_start\ndata: {}\n\n", delta, stop, DONE]
    assert collect(events, finished_after=1, seen=ReportSeen()) == [
        events[0],
        in_message_delta(delta, REPORT),
        stop,
        DONE,
    ]


def test_a_report_is_found_in_the_chunk_that_has_it() -> None:
    assert report_in_chunk(chunk(choices=[], hidrop=REPORT)) == REPORT
    for other in (chunk(choices=[1]), chunk(choices=[{"text": '"hidrop":'}]), DONE, ": a comment\n\n"):
        assert report_in_chunk(other) is None


def test_a_report_goes_into_the_event_with_the_usage_of_a_message() -> None:
    delta = 'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":3}}\n\n'
    sent = in_message_delta(delta, REPORT)
    assert sent.startswith("event: message_delta\ndata: ")
    assert sent.endswith("\n\n")
    assert json.loads(sent.splitlines()[1].removeprefix("data: ")) == {
        "type": "message_delta",
        "usage": {"output_tokens": 3},
        "hidrop": REPORT,
    }
    stop = 'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    assert in_message_delta(stop, REPORT) == stop
    assert in_message_delta(delta, None) == delta
