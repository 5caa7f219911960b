"""`hidrop loadtest` against a real server: requests through vLLM's client, savings from the server's own counters."""

import json
from pathlib import Path

import pytest

from hidrop_loadtests import scenarios
from hidrop_loadtests.running import Arm, Keys, connect, run
from hidrop_loadtests.scenarios import choose
from tests.server.harness import Server
from vllm_hidrop.cli.loadtest import Target
from vllm_hidrop.cli.loadtest import run as command

pytestmark = pytest.mark.server


def test_smoke_passes_and_its_report_shows_what_pruning_saved(server: Server, tmp_path: Path) -> None:
    before = server.metric("vllm_hidrop_requests_total")
    code = command("smoke", choose("smoke"), Target(server.url, "off", Keys(), False), tmp_path)
    found = json.loads((tmp_path / "smoke.json").read_text())
    assert code == 0, found["verdicts"]
    pruned, off = found["arms"]
    assert pruned["requests"] == off["requests"] == {"answered": 8, "refused": 0, "cancelled": 0, "failed": 0}
    assert server.metric("vllm_hidrop_requests_total") - before == 24  # four of each arm warm up
    assert pruned["savings"]["pairs"]["layer tokens of prefills"]["ratio"] > 2
    assert pruned["savings"]["pairs"]["KV blocks held"]["ratio"] > 2
    assert off["savings"]["pairs"]["layer tokens of prefills"]["ratio"] == 1
    for arm in (pruned, off):
        assert all(outcome["output_tokens"] == 16 for outcome in arm["outcomes"])
        # The client's clock starts before the server's, and both see the same first tokens.
        assert 0 < arm["server_ms"]["ttft"]["mean"] <= arm["client_ms"]["ttft"]["mean"] + 1
    page = (tmp_path / "smoke.html").read_text()
    assert page.count("<svg") == 3
    assert "off, server" in page


def test_clients_that_leave_and_hostile_ones_cost_nobody_an_answer(server: Server) -> None:
    """A short form of cancel-storm and abuse at once."""
    chosen = scenarios.choose("abuse").model_copy(
        update={"requests": 36, "cancel_share": 0.2, "output_tokens": 8, "cancel_within_seconds": 0.5}
    )
    (result,) = run(chosen, [Arm("pruned", connect(server.url), True)], quiet=True)
    from hidrop_loadtests.judging import judge

    missed = [verdict for verdict in judge(chosen, result) if not verdict.passed]
    assert not missed
    assert result.count("refused", bad=True) > 6
    assert result.count("cancelled") > 1


def test_another_server_is_compared_in_alternating_order(server: Server, tmp_path: Path) -> None:
    """By its address; here the same server stands for both, so the second prunes too."""
    short = choose("smoke").model_copy(update={"requests": 2, "output_tokens": 2})
    assert command("smoke", short, Target(server.url, server.url, Keys(), False), tmp_path, pairs=2) == 0
    found = json.loads((tmp_path / "smoke.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == ["pruned", server.url]
    assert [arm["requests"]["answered"] for arm in found["arms"]] == [4, 4]
    assert all(arm["savings"]["pairs"]["layer tokens of prefills"]["ratio"] > 2 for arm in found["arms"])


def test_turns_reuse_the_prefix_of_their_conversation(server: Server) -> None:
    chosen = scenarios.choose("chat-turns").model_copy(update={"requests": 8, "turns": 4, "output_tokens": 4})
    (result,) = run(chosen, [Arm("pruned", connect(server.url), True)], quiet=True)
    assert result.count("answered") == 8
    assert (result.growth.total("vllm_hidrop_prefix_tokens_reused_total") or 0) > 3 * 576
