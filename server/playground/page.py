"""`GET /playground`: one page that asks, and shows what was kept, put together from this folder's files."""

from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

FOLDER = Path(__file__).parent
SCRIPTS = ("state.js", "picture.js", "video.js", "grid.js", "asking.js", "results.js", "start.js")
"""Joined in this order."""
PATH = "/playground"

router = APIRouter()


@router.get(PATH, include_in_schema=False)
async def show_playground() -> HTMLResponse:
    """The page."""
    page, headers = build()
    return HTMLResponse(page, headers=headers)


@cache
def build() -> tuple[str, dict[str, str]]:
    """The page and its headers: it may run its own script and style, talk to this server, and nothing else.

    Style and script stand in the page, so that the content security policy names them by hash and allows no address.
    """
    style, script = _read("style.css"), "".join(map(_read, SCRIPTS))
    page = _read("page.html")
    for tag, text in (("style", style), ("script", script)):
        before, after = page.split(f"<{tag}></{tag}>")
        page = f"{before}<{tag}>{text}</{tag}>{after}"
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",
        "media-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return page, {
        "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The content security policy's name for an inline element."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
