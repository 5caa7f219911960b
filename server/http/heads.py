"""`HEAD` wherever there is `GET`: the same status and header.

Knows ASGI.
"""

from starlette.types import ASGIApp, Receive, Scope, Send


class Heads:
    """Asks the application for the whole answer; the HTTP server, which knows what was asked, sends no body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Turn one method into the other."""
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self.app({**scope, "method": "GET"} if is_head else scope, receive, send)
