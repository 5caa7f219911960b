"""Reports that reach the API process before a sequence ends there."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_hidrop.engine.compat import subclass

REPORT = {"mode": "pruned"}


class Counted:
    """Remembers what was counted."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, bool]] = []

    def ended(self, report: Any, aborted: bool = False, times: Any = None) -> None:
        self.calls.append((report, aborted))

    def refused(self, reason: str) -> None:
        self.calls.append((reason, False))


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.v1.engine.output_processor import OutputProcessor

    from hidrop_server.engine import HidropOutputProcessor

    monkeypatch.setattr(OutputProcessor, "process_outputs", lambda self, outputs: outputs)
    metrics: Any = Counted()
    extended = HidropOutputProcessor(metrics, None, log_stats=False)
    extended.request_states = {
        "r": SimpleNamespace(
            request_id="r", external_req_id="x", parent_req=None, lora_name=None, queue=None, stats=None
        )
    }
    extended.external_req_ids["x"].append("r")
    return extended


def output(request_id: str, params: dict[str, Any] | None) -> Any:
    return SimpleNamespace(request_id=request_id, kv_transfer_params=params, finish_reason=None)


def test_an_early_report_is_handed_on_and_counted_once_when_a_stop_string_ends_the_sequence(processor: Any) -> None:
    first, later = output("r", {"hidrop": REPORT, "other": 1}), output("r", None)
    processor.process_outputs([first])
    processor.process_outputs([later])
    assert first.kv_transfer_params == {"hidrop": REPORT, "other": 1}
    assert later.kv_transfer_params == {"hidrop": REPORT}
    processor._finish_request(processor.request_states["r"])
    assert processor.metrics.calls == [(REPORT, False)]
    assert processor.reports == {}


def test_outputs_of_a_request_that_is_gone_are_left_alone(processor: Any) -> None:
    late = output("gone", {"hidrop": REPORT})
    processor.process_outputs([late])
    assert processor.reports == {}


def test_findings_of_several_engines_name_theirs() -> None:
    from hidrop_server.engine import merged

    sound, faulty = ({"checks": 2, "failed_checks": len(faults), "findings": faults} for faults in ([], ["a leak"]))
    assert merged([faulty]) == faulty
    assert merged([sound, faulty]) == {"checks": 4, "failed_checks": 1, "findings": ["engine 1: a leak"]}


def test_an_object_of_a_class_that_vllm_no_longer_builds_is_not_subclassed() -> None:
    with pytest.raises(TypeError, match="extends another class"):
        subclass(object.__new__(type("Other", (), {})), dict, why="")


@pytest.mark.parametrize(("reason", "status"), [(None, 503), (7, 503), ("no way", 400)])
def test_a_sequence_that_fails_may_be_asked_again_unless_there_is_a_reason(
    processor: Any, reason: Any, status: int
) -> None:
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
    processor.request_states["r"].queue = queue
    assert processor._fail(processor.request_states["r"], reason) == []
    with pytest.raises(Exception) as raised:  # noqa: PT011
        queue.get_nowait()
    assert create_error_response(raised.value).error.code == status
