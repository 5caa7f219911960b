"""Keys of `vllm_xargs` that nobody would read."""

from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace

import pytest

from hidrop_server.control import options
from hidrop_server.control.options import VLLM_KEYS, check_keys, others_are_read
from vllm_hidrop.plan.planner import REQUEST_KEYS


@pytest.mark.parametrize("are_read", [True, False])
def test_what_somebody_reads_is_taken(are_read: bool) -> None:
    check_keys([*REQUEST_KEYS, *VLLM_KEYS], are_read)


@pytest.mark.parametrize("key", ["keep", "explain", "Hidrop", "", "hidrop_keeps"])
def test_what_nobody_reads_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"unknown request option '{key}'; known: hidrop, hidrop_keep"):
        check_keys([key], others_are_read=False)


def test_logits_processors_read_what_they_like_but_not_ours() -> None:
    check_keys(["target_token"], others_are_read=True)
    with pytest.raises(ValueError, match="unknown request option"):
        check_keys(["hidrop_keeps"], others_are_read=True)


def test_processors_are_those_of_the_flag_and_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = EntryPoints([EntryPoint("one", "a:b", options.PROCESSORS)])
    monkeypatch.setattr(options, "entry_points", lambda group: EntryPoints(()).select(group=group))
    assert not others_are_read(SimpleNamespace(logits_processors=None))
    assert others_are_read(SimpleNamespace(logits_processors=["a:b"]))
    monkeypatch.setattr(options, "entry_points", lambda group: installed.select(group=group))
    assert others_are_read(SimpleNamespace(logits_processors=None))
