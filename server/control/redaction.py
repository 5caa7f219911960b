"""Keep API keys out of the log."""

import logging
from collections.abc import Iterable
from typing import Any

HIDDEN = "***"


def hide_in_logs(secrets: Iterable[str]) -> None:
    """Replace the secrets in every record that this process logs from now on, whichever logger and handler.

    vLLM hides ``--api-key`` in its list of arguments, but logs its own command line when it stops.
    """
    hidden = sorted({secret for secret in secrets if secret}, key=len, reverse=True)
    if not hidden:
        return
    make = logging.getLogRecordFactory()

    def redact(value: Any) -> Any:
        if isinstance(value, int | float | None):
            return value
        text = str(value)
        for secret in hidden:
            text = text.replace(secret, HIDDEN)
        return value if text == str(value) else text

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg = redact(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(redact(each) for each in record.args)
        elif record.args:
            record.args = {key: redact(value) for key, value in record.args.items()}
        return record

    logging.setLogRecordFactory(make_redacted)
