"""No key in a log record; no engine."""

import logging
from collections.abc import Iterator

import pytest

from hidrop_server.control.redaction import hide_in_logs


@pytest.fixture(autouse=True)
def factory() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(before)


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("launched with command:\n%s", ("hidrop serve --api-key key-one",)),
        ("port %s is used by process %s: %s", (8000, 12, "--api-key=key-one-and-more")),
        ("key-one in the message", ()),
        ("%(key)s", ({"key": "key-one"},)),
        ("%s", (["--api-key", "key-one"],)),
        ("%s", (ValueError("key-one"),)),
    ],
)
def test_a_key_is_hidden_wherever_it_stands(
    caplog: pytest.LogCaptureFixture, message: str, args: tuple[object]
) -> None:
    hide_in_logs(["key-one", "", "key-one-and-more"])
    logging.getLogger("anything").warning(message, *args)
    assert "key-one" not in caplog.text
    assert "***" in caplog.text


def test_a_record_without_a_key_is_as_it_was() -> None:
    hide_in_logs(["key-one"])
    arguments = ("127.0.0.1:9", "GET", "/health", "1.1", 200)
    record = logging.getLogRecordFactory()("uvicorn.access", logging.INFO, "", 0, '%s - "%s %s %s" %d', arguments, None)
    assert record.args == arguments, "the access log's formatter unpacks them"


def test_without_keys_nothing_is_changed() -> None:
    before = logging.getLogRecordFactory()
    hide_in_logs(["", ""])
    assert logging.getLogRecordFactory() is before
