"""Why a request body is refused, raised by whatever reads it. Knows nothing else."""


class BodyRefused(Exception):
    """A body that this server does not take.

    Attributes:
        says: one line for the client; names the field and never repeats its value.
        reason: of ``vllm_hidrop_refused_requests_total``.
    """

    def __init__(self, says: str, reason: str = "body") -> None:
        super().__init__(says)
        self.says = says
        self.reason = reason
