"""A headless Chromium, the system's own, and the playground as a person finds it there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
ADVICE = "no Chromium on this machine, so NOTHING of the playground is tested in a browser: run scripts/chromium.sh"
PATIENCE_MS = 120_000.0
"""For answers; nothing waits so long on a machine that works."""


def chromium_path() -> str | None:
    """The first one on the PATH."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start it; loopback needs no sandbox, and as root Chromium has none."""
    path = chromium_path()
    assert path is not None, ADVICE
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def playground(browser: Browser, url: str, forgives: str | None = None, **settings: Any) -> Iterator[Page]:
    """A fresh page that has met the server; in the end no error was logged and nobody else was asked for anything.

    Args:
        browser: running.
        url: of the server.
        forgives: text of errors that the test provokes.
        settings: of the browser's context, such as ``color_scheme``.
    """
    faults: list[str] = []

    def note(text: str) -> None:
        if forgives is None or forgives not in text:
            faults.append(text)

    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | settings))
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.on("console", lambda message: note(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: note(str(error)))
    page.on("request", lambda request: None if request.url.startswith((url, "data:")) else note(request.url))
    try:
        page.goto(f"{url}/playground")
        expect(page.locator("#about")).not_to_have_text("Asking the server what it serves.", timeout=PATIENCE_MS)
        yield page
    finally:
        context.close()
    assert faults == [], faults


def ask(page: Page) -> None:
    """Press Ask and wait for both answers."""
    page.get_by_role("button", name="Ask", exact=True).click()
    wait(page)


def wait(page: Page) -> None:
    """Until both answers are there."""
    expect(page.locator("#status")).to_have_text("Done.", timeout=PATIENCE_MS)


def go_to_stage(page: Page, index: int) -> None:
    """Move the slider as a keyboard does."""
    slider = page.get_by_role("slider", name="Stage")
    slider.press("Home")
    for _ in range(index):
        slider.press("ArrowRight")
