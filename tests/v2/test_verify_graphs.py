"""``hidrop verify`` on the V2 runner: all rows of HiDrop, those of decode graphs too, as the emulation replays them."""

from dataclasses import replace
from pathlib import Path

import pytest

from vllm_hidrop.verify.cases import TINY, tiny_models
from vllm_hidrop.verify.checks import Machine, Subject, jobs_of, rows_of
from vllm_hidrop.verify.comparing import Status
from vllm_hidrop.verify.engines import EngineChild, run_jobs
from vllm_hidrop.verify.expected import References

pytestmark = pytest.mark.engine

NEVER = float("inf")


def test_graphs_of_the_v2_runner_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(tiny_models(tmp_path)[0], served=TINY[:1], layouts=("3i5", "2ii3", "9"))
    jobs = jobs_of(model, "float32", with_graphs=True)
    monkeypatch.setattr(EngineChild, "module", "tests.v2.emulated_engine")
    ran = run_jobs(jobs, lambda: None, False, NEVER)
    assert {found.facts["runner"] for found in ran.values()} == {"V2"}
    subject = Subject(model, "float32", ran, jobs, References(model, "float32", "cpu"))
    rows = list(rows_of(subject, Machine("cpu", "float32", with_gpu=True), NEVER))
    assert {row.name: row.detail for row in rows if row.status is not Status.PASSED} == {}
    assert len(rows) == 7
