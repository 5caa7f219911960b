"""The client's side, against a server that only streams words; tests/server/test_loadtest.py loads a real one."""

import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hidrop_loadtests import report
from hidrop_loadtests.judging import judge
from hidrop_loadtests.metrics import Growth, Samples
from hidrop_loadtests.running import OFF, Arm, Keys, Result, check_address, connect, run
from hidrop_loadtests.scenarios import choose
from hidrop_loadtests.sending import Outcome, send
from hidrop_loadtests.traffic import first_turns, mistakes
from tests.loadtests.stub_server import Stub, stub_server
from tests.loadtests.test_scenarios import scenario


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server() as running:
        yield running


def load(stub: Stub, **more: Any) -> Result:
    """One arm, without the warm-up."""
    (result,) = run(scenario(**more), [Arm("pruned", connect(stub.url), True)], quiet=True)
    return result


def test_both_arms_are_asked_alike_and_reported_side_by_side(stub: Stub) -> None:
    plain, off = connect(stub.url, Keys("key")), connect(stub.url, body=OFF)
    chosen = scenario(passes={"layer_token_ratio": 2.5, "good_share": 1.0})
    results = run(chosen, [Arm("pruned", plain, True), Arm("off", off, False)], quiet=True)
    assert [result.count("answered") for result in results] == [12, 12]
    assert len(stub.bodies) == 32
    warm, measured = stub.bodies[:8], stub.bodies[8:]
    assert [("vllm_xargs" in body) for body in warm] == [False] * 4 + [True] * 4
    assert all(body["max_completion_tokens"] == 4 and body["ignore_eos"] and body["stream"] for body in measured)
    assert ["vllm_xargs" in body for body in measured] == [False] * 12 + [True] * 12
    for result in results:
        times = result.client_ms()
        assert times["ttft"]["p50"] >= 10
        assert times["e2e"]["p50"] >= 40
        assert times["itl"]["mean"] > 5
        assert result.server_ms()["ttft"] == pytest.approx({"mean": 20, "p50": 50, "p90": 90, "p95": 95, "p99": 99})
        (saving,) = result.growth.savings()["pairs"].values()
        assert saving == {"run": 1200, "dense": 3600, "ratio": 3}
        assert [outcome.output_tokens for outcome in result.outcomes] == [4] * 12
    verdicts = [verdict for result in results for verdict in judge(chosen, result)]
    assert all(verdict.passed for verdict in verdicts), verdicts
    found = report.as_json("mine <b>", chosen, results, verdicts)
    assert json.loads(json.dumps(found)) == found
    assert found["speed_up"]["ttft"]["p50"] == pytest.approx(
        results[1].client_ms()["ttft"]["p50"] / results[0].client_ms()["ttft"]["p50"]
    )
    page = report.as_html(found, [result.times_ms() for result in results])
    assert page.count("<svg") == 3
    assert "mine &lt;b&gt;" in page
    assert not re.search(r"(?:src|href)=", page)
    seen = _Tags()
    seen.feed(page)
    assert seen.open == []


class _Tags(HTMLParser):
    """Which elements are never closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        """Closed at once."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_clients_that_go_away_close_their_connection(stub: Stub) -> None:
    stub.token_seconds = 0.2
    result = load(stub, cancel_share=1.0, cancel_within_seconds=0.3, output_tokens=20)
    assert result.count("cancelled") == 12
    assert judge(scenario(), result)[0].passed
    deadline = time.monotonic() + 30
    while stub.left < 12:
        assert time.monotonic() < deadline, stub.left
        time.sleep(0.05)


def test_what_is_not_answered_in_time_is_given_up_and_fails_the_run(stub: Stub) -> None:
    stub.token_seconds = 5
    started = time.monotonic()
    chosen = scenario(seconds=0.5)
    sent = send(chosen, first_turns(chosen, 0), connect(stub.url), time.monotonic() + 0.5, True)
    assert time.monotonic() - started < 20
    assert {outcome.kind for outcome in sent.outcomes} == {"failed"}
    assert {outcome.error for outcome in sent.outcomes} == {"not answered in the scenario's seconds"}


def test_a_bad_request_that_is_answered_fails_the_run(stub: Stub) -> None:
    result = load(stub, bad_share=1.0, requests=len(mistakes()))
    names = [outcome.bad for outcome in result.outcomes]
    assert set(names) == set(mistakes())
    kinds = {outcome.bad: outcome.kind for outcome in result.outcomes}
    assert kinds["unknown option"] == "refused"
    assert kinds["file URL"] == "answered"
    verdicts = {verdict.what: verdict for verdict in judge(scenario(), result)}
    assert not verdicts["bad requests refused"].passed
    assert "file URL: answered" in verdicts["bad requests refused"].found
    assert "unknown option" not in verdicts["bad requests refused"].found


def test_every_turn_sends_the_answers_before_it(stub: Stub) -> None:
    result = load(stub, turns=3, requests=6)
    assert result.count("answered") == 6
    lengths = [len(body["messages"]) for body in stub.bodies[4:]]
    assert lengths == [1, 1, 3, 3, 5, 5]
    assert stub.bodies[-1]["messages"][3] == {"role": "assistant", "content": "w0 w1 w2 w3 "}


def test_pairs_alternate_and_are_reported_as_one(stub: Stub) -> None:
    plain, off = connect(stub.url), connect(stub.url, body=OFF)
    order: list[str] = []
    arms = [Arm("pruned", plain, True), Arm("off", off, False)]
    results = run(scenario(requests=2), arms, 3, order.append, quiet=True)
    assert order == ["pruned", "off", "off", "pruned", "pruned", "off"]
    assert [result.count("answered") for result in results] == [6, 6]
    assert [result.growth.total("vllm_hidrop_layer_tokens_run_total") for result in results] == [600, 600]
    pictures = [json.dumps(body["messages"][0]["content"][0]) for body in stub.bodies]
    assert len(set(pictures)) == len(pictures) == 20


def test_arrivals_follow_the_scenario(stub: Stub) -> None:
    result = load(stub, arrivals={"kind": "burst", "at_once": 6, "every_seconds": 1})
    sent = sorted(outcome.sent_at for outcome in result.outcomes)
    assert sent[6] - sent[0] >= 0.9
    assert sent[5] - sent[0] < sent[6] - sent[0]


def test_thresholds_that_are_missed_are_named(stub: Stub) -> None:
    chosen = scenario(goal={"ttft_ms": 0.001, "e2e_ms": 1}, passes={"good_share": 0.5, "layer_token_ratio": 3.5})
    result = run(chosen, [Arm("pruned", connect(stub.url), True)], quiet=True)[0]
    missed = {verdict.what: verdict.found for verdict in judge(chosen, result) if not verdict.passed}
    assert missed == {"answers within the goal": "0.0%", "layer tokens, dense to run": "3.00x"}


@pytest.mark.parametrize(
    ("fault", "missed"),
    [
        ({}, set()),
        ({"status": 500}, {"requests without an answer", "answers within the goal", "layer tokens, dense to run"}),
        ({"lost_tokens": 2}, {"requests without an answer", "answers within the goal"}),
        ({"dense": 100}, {"layer tokens, dense to run"}),
        ({"ready": False}, {"idle and ready again"}),
    ],
    ids=["healthy", "500", "stream cut short", "no savings", "not ready"],
)
def test_a_broken_server_fails_the_shipped_thresholds(stub: Stub, fault: dict[str, Any], missed: set[str]) -> None:
    for key, value in fault.items():
        setattr(stub, key, value)
    if "status" in fault:
        stub.dense = 100  # who answers nothing saves nothing
    chosen = scenario(requests=2, passes=choose("smoke").passes.model_dump() | {"idle_seconds": 0.3})
    (result,) = run(chosen, [Arm("pruned", connect(stub.url), True)], quiet=True)
    verdicts = judge(chosen, result)
    assert {verdict.what for verdict in verdicts if not verdict.passed} == missed
    page = report.as_html(report.as_json("x", chosen, [result], verdicts), [result.times_ms()])
    assert ("before its 4 tokens" in page) == ("lost_tokens" in fault)
    assert ("Internal Server Error" in page) == ("status" in fault)


def test_answers_that_grow_slower_fail_a_soak(stub: Stub) -> None:
    def answered(seconds: float, sent_at: float) -> Outcome:
        return Outcome("answered", sent_at, latency=seconds)

    arm, growth = Arm("pruned", connect(stub.url), True), Growth({})
    chosen = scenario(passes={"drift": 3})
    for end, passed in ((2.9, True), (3.1, False)):
        outcomes = (*(answered(end, 90 + i) for i in range(3)), *(answered(1, i) for i in range(6)))
        verdicts = {v.what: v.passed for v in judge(chosen, Result(arm, outcomes, 100, growth, 0))}
        assert verdicts["times at the end to the start"] is passed
    assert Result(arm, outcomes[:2], 100, growth, 0).drift() is None


@pytest.mark.parametrize(
    "url", ["http://10.1.2.3:8000", "https://example.org", "http://127.0.0.1.nip.io", "http://0.0.0.0:8000"]
)
def test_another_machine_needs_leave(url: str) -> None:
    with pytest.raises(ValueError, match="needs --allow-remote"):
        check_address(url, allow_remote=False)
    assert check_address(url, allow_remote=True) == url


def test_loopback_needs_none_and_no_address_is_refused() -> None:
    for url in ("http://127.0.0.1:8000", "http://[::1]:8000", "http://localhost"):
        assert check_address(url + "/", allow_remote=False) == url
    for url in ("127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://127.0.0.1:99999"):
        with pytest.raises(ValueError, match="is not an address"):
            check_address(url, allow_remote=True)


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/v1/models: "):
        connect("http://127.0.0.1:9")


def test_an_interpolated_percentile_lies_in_its_bucket() -> None:
    before: Samples = {("t_bucket", (("le", le),)): 0.0 for le in ("0.1", "0.2", "+Inf")}
    after: Samples = dict(zip(before, (5.0, 9.0, 10.0), strict=True)) | {("t_sum", ()): 1.5, ("t_count", ()): 10.0}
    found = Growth.between(before, after).latency_ms("t")
    assert found == pytest.approx({"mean": 150, "p50": 100, "p90": 200, "p95": 200, "p99": 200})
    assert Growth.between(after, after).latency_ms("t") is None


def test_the_reader_of_a_report_gets_files(tmp_path: Path, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_hidrop.cli import loadtest

    own = tmp_path / "own.toml"
    own.write_text(
        '[mine]\nsummary = "?"\nseed = 1\nrequests = 2\nseconds = 30\narrivals = {kind = "closed", at_once = 1}\n'
        "images = 1\nimage_side = 32\nwords = 3\noutput_tokens = 2\ngoal = {ttft_ms = 9000, e2e_ms = 9000}\n"
    )
    assert (
        loadtest.run("mine", choose("mine", own), loadtest.Target(stub.url, "off", Keys(), False), tmp_path / "out")
        == 0
    )
    assert json.loads((tmp_path / "out" / "mine.json").read_text())["passed"] is True
    assert (tmp_path / "out" / "mine.html").read_text().startswith("<!doctype html>")
    assert "mine.html" in capsys.readouterr().out.replace("\n", "")
