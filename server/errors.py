"""What this server refuses: a command line before it starts, a request body before vLLM reads it."""

from http import HTTPStatus


class StartError(Exception):
    """A start-up choice that cannot be honoured; the message is one line."""


class BodyRefused(Exception):
    """A body that this server does not take.

    Attributes:
        says: one line for the client; names the field and never repeats its value.
        reason: label of ``vllm_hidrop_refused_requests_total``.
        status: of the answer.
    """

    def __init__(self, says: str, reason: str = "body", status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(says)
        self.says = says
        self.reason = reason
        self.status = status


def one_line(error: BaseException) -> str:
    """An error's message as one line.

    Of a pydantic ``ValidationError`` it leaves out the headline, "Value error, ", the dump of the input and the link.
    """
    errors = getattr(error, "errors", None)
    if callable(errors):
        text = "; ".join(str(entry["msg"]) for entry in errors())
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.replace("Value error, ", "").split())
