"""Start-up refusals: one line for the person at the terminal.

Knows no vLLM.
"""


class StartError(Exception):
    """A start-up choice that cannot be honoured; the message is one line."""


def one_line(error: BaseException) -> str:
    """The heart of an error as one line.

    A pydantic ``ValidationError`` wraps the ``ValueError`` of a configuration hook in a headline, the message after
    "Value error, ", a dump of the input and a link; only the message is of use.
    """
    errors = getattr(error, "errors", None)
    if callable(errors):
        text = "; ".join(str(entry["msg"]) for entry in errors())
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.replace("Value error, ", "").split())
