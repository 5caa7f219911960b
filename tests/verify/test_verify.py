"""``hidrop verify`` on this machine: all passes, its page and JSON; and every fault that is put in is found."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.families.checkpoints import CHECKPOINTS
from tests.verify.faulty_engine import FAULTS
from vllm_hidrop.cli import verify as command
from vllm_hidrop.methods import METHODS
from vllm_hidrop.verify import cases, checks
from vllm_hidrop.verify.cases import TINY, TINY_QWEN, Model, tiny_models
from vllm_hidrop.verify.checks import STOCK, Machine, Subject, jobs_of, rows_of
from vllm_hidrop.verify.comparing import Status
from vllm_hidrop.verify.engines import EngineChild, Job, Ran, run_jobs
from vllm_hidrop.verify.expected import References
from vllm_hidrop.verify.report import Report

pytestmark = pytest.mark.engine

MACHINE = Machine("cpu", "bfloat16", with_gpu=False)
NEVER = float("inf")
STAGED = "everything kept, by the staged loop = stock"
BLOCKS = "kept tokens and KV blocks = plan, pool whole at the end"
FAILING = {
    "the worst tokens are kept": {"hidrop = reference"},
    "slots are shifted": {"hidrop = reference", STAGED, "off = stock"},
    "rows come back in other places": {"hidrop = reference", STAGED},
    "other logits": {"hidrop = reference", STAGED, "off = stock"},
    "a block too many": {BLOCKS},
    "a block is not given back": {BLOCKS},
}


class Verified(NamedTuple):
    """A whole run: its exit status, what it printed and wrote, and what its engines gave."""

    status: int
    page: str
    written: dict[str, Any]
    ran: dict[str, Ran]


def run(wish: command.Wish) -> Verified:
    """The command, without its page on the terminal."""
    assert wish.json_file is not None
    ran: dict[str, Ran] = {}

    def keeping(*given: Any) -> dict[str, Ran]:
        found = run_jobs(*given)
        ran.update({f"{next(iter(given[0].values())).model.name}, {name}": of for name, of in found.items()})
        return found

    pages: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "run_jobs", keeping)
        patch.setattr(Report, "show", lambda report: pages.append("\n".join((report.verdict, *report.header()))))
        status = command.run(wish)
    return Verified(status, pages[0], json.loads(wish.json_file.read_text()), ran)


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Verified:
    """The tiny models in float32, no table."""
    return run(command.Wish(None, "float32", "tiny", 0, tmp_path_factory.mktemp("verify") / "verify.json"))


def statuses(verified: Verified, subject: str) -> dict[str, str]:
    """How each row of a subject ended."""
    return {check["name"]: check["status"] for check in verified.written["checks"] if check["subject"] == subject}


def test_every_method_passes_and_what_did_not_run_is_named(verified: Verified) -> None:
    assert verified.status == 0
    every = ("stock = reference, dense", "off = stock", STAGED, BLOCKS)
    graphs = {"graphs replay = eager": "not run"}
    methods = [f"{method} = reference" for method in METHODS if method != "none"]
    assert statuses(verified, "tiny LLaVA, float32") == dict.fromkeys((*every, *methods), "passed") | graphs
    methods = [f"{method} = reference" for served in TINY_QWEN for method in served.methods]
    assert statuses(verified, "tiny Qwen3-VL, float32") == dict.fromkeys((*every, *methods), "passed") | graphs
    found = verified.written["checks"]
    reasons = {check["name"]: check["detail"] for check in found if check["status"] == "not run"}
    assert reasons.pop("graphs replay = eager") == "no CUDA graphs on a CPU"
    for backend in ("flash-attn", "xformers"):
        assert reasons.pop(f"{backend} = PyTorch's").startswith("is not installed")
    assert set(reasons.values()) == {"time"}
    assert len(reasons) == 5


def test_every_method_is_verified() -> None:
    assert {name for served in TINY for name in served.methods} == set(METHODS) - {"none"}


def test_a_users_model_of_another_family_is_asked_with_images_of_two_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    CHECKPOINTS["qwen2_5_vl"].make(checkpoint)
    monkeypatch.setattr(command, "tiny_models", lambda _: [])
    monkeypatch.setattr(command, "_time", lambda *_: None)
    monkeypatch.setattr(cases, "OWN_MODEL", (cases.OWN_MODEL[0], cases.OWN_MODEL[-1]))
    found = run(command.Wish(str(checkpoint), "float32", "tiny", 60, tmp_path / "verify.json"))
    assert found.status == 0
    passed = ("stock = reference, dense", "off = stock", STAGED, BLOCKS, "hidrop = reference", "mustdrop = reference")
    rows = dict.fromkeys(passed, "passed") | {"graphs replay = eager": "not run"}
    assert statuses(found, f"{checkpoint}, float32") == rows
    details = {check["name"]: check["detail"] for check in found.written["checks"]}
    assert details["mustdrop = reference"].startswith("without its part in the tower; same vision tokens in 2 of 2")
    answers = next(ran for name, ran in found.ran.items() if name.endswith(STOCK)).answers["off"]
    assert [[end - first for first, end in answer.prompt.spans] for answer in answers] == [[60], [64, 60]]


def test_the_page_says_what_served(verified: Verified) -> None:
    assert verified.page.startswith("hidrop verify: passed (18 passed, 0 failed, 9 not run), ")
    assert "float32: runner V1, attention CPU_ATTN, CUDA graphs NONE" in verified.page


def test_the_json_has_every_row_and_the_versions(verified: Verified) -> None:
    written = verified.written
    assert set(written) == {
        *("verdict", "exit_status", "model", "weights", "seconds", "versions", "engines", "checks", "timing")
    }
    assert written["exit_status"] == 0
    assert all(set(check) == {"subject", "name", "status", "detail"} for check in written["checks"])
    subjects = {check["subject"] for check in written["checks"]}
    assert subjects == {"tiny LLaVA, float32", "tiny Qwen3-VL, float32", "training", "timing, tiny shape"}
    assert {"vllm", "torch", "python", "vllm_hidrop"} <= set(written["versions"])
    assert written["engines"][0]["runner"] == "V1"


@dataclass(frozen=True)
class FaultyJob(Job):
    """A job of ours with a fault."""

    fault: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"fault": self.fault}


class FaultyChild(EngineChild):
    module = "tests.verify.faulty_engine"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return replace(tiny_models(tmp_path_factory.mktemp("tiny"))[0], served=TINY[:1])


@pytest.fixture(scope="module")
def references(model: Model) -> References:
    return References(model, "float32", "cpu")


@pytest.fixture(scope="module")
def faulty(model: Model) -> Iterator[FaultyChild]:
    with FaultyChild(ours=True, model=model.path) as child:
        yield child


def test_every_fault_has_its_row() -> None:
    assert set(FAULTS) == {*FAILING, "the process ends"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_rows_and_no_other(
    verified: Verified, model: Model, references: References, faulty: FaultyChild, fault: str
) -> None:
    jobs = jobs_of(model, "float32", with_graphs=False)
    job = FaultyJob(**vars(jobs["hidrop"]), fault=fault)
    ran = {STOCK: verified.ran[f"tiny LLaVA, float32: {STOCK}"], "hidrop": faulty.run(job)}
    report = Report(None, "tiny")
    report.add(list(rows_of(Subject(model, "float32", ran, jobs, references), MACHINE, NEVER)), list(ran.values()))
    failed = {check.name: check.detail for check in report.checks if check.status is Status.FAILED}
    assert report.exit_status == 1
    if fault == "the process ends":
        assert "the measured process ended" in failed["hidrop = reference"]
    else:
        assert set(failed) == FAILING[fault]
        assert all("prompt" in detail or "pool" in detail for detail in failed.values()), failed


def test_the_served_type_passes_within_what_stock_rounds(model: Model) -> None:
    references = References(model, "bfloat16", "cpu")
    jobs = jobs_of(model, "bfloat16", with_graphs=False)
    ran = run_jobs(jobs, lambda: None, False, NEVER)
    found = {check.name: check for check in rows_of(Subject(model, "bfloat16", ran, jobs, references), MACHINE, NEVER)}
    assert {check.status for check in found.values()} == {Status.PASSED, Status.NOT_RUN}
    assert found["off = stock"].detail == "40 tokens equal"
    assert "tolerance" in found["hidrop = reference"].detail


def test_without_stock_vllm_nothing_can_run(model: Model, references: References) -> None:
    ran = {STOCK: Ran({}, {}, [], "RuntimeError: no device"), "hidrop": Ran({}, {}, [], "no device")}
    jobs = jobs_of(model, "float32", with_graphs=False)
    report = Report(None, "tiny")
    report.add(list(rows_of(Subject(model, "float32", ran, jobs, references), MACHINE, NEVER)))
    assert report.exit_status == 2
    assert [check.detail for check in report.checks] == ["stock vLLM does not run: RuntimeError: no device"]


def test_a_model_that_cannot_be_read_is_one_line_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model directory"):
        command.run(command.Wish(str(tmp_path / "none"), "auto", "tiny", 0, None))
