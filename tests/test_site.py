"""The documentation site: it builds without a warning, search finds its pages, and they load nothing from elsewhere."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from tests.server.playground.browser import ADVICE, chromium, chromium_path

ROOT = Path(__file__).parents[1]
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Loaded(HTMLParser):
    """Collects the addresses that a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(LOADS.get(tag, ""))
        if address:
            self.addresses.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.glob("**/*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.addresses, page.name
        assert [each for each in loaded.addresses if urlsplit(each).netloc] == [], page.name


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.skipif(chromium_path() is None, reason=ADVICE)
def test_search_finds_a_page_and_a_browser_asks_nobody_else(address: str) -> None:
    asked: list[str] = []
    with chromium() as browser:
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/index.html")
        page.get_by_placeholder("Search").click()
        page.keyboard.type("HidropQueueGrows")
        expect(page.locator(".md-search-result__item").first).to_contain_text("Runbook", timeout=30_000)
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def test_a_dead_link_a_dead_anchor_and_a_page_outside_the_navigation_are_errors(tmp_path: Path) -> None:
    """The settings of mkdocs.yml, tried on a site of two pages."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    validation = settings[settings.index("validation:") : settings.index("markdown_extensions:")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: two\nstrict: true\nnav: [index.md, other.md]\n{validation}")
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "other.md").write_text("# Other\n")
    for text, fault in (
        ("# Start\n\n[good](other.md#other)\n", ""),
        ("# Start\n\n[dead](nowhere.md)\n", "nowhere.md"),
        ("# Start\n\n[dead](other.md#nowhere)\n", "#nowhere"),
        ("# Start\n\n[absolute](/other.md)\n", "/other.md"),
    ):
        (pages / "index.md").write_text(text)
        done = _build(tmp_path)
        assert (done.returncode == 0) == (not fault), done.stderr
        assert fault in done.stderr
    (pages / "index.md").write_text("# Start\n")
    (pages / "forgotten.md").write_text("# Forgotten\n")
    assert "forgotten.md" in _build(tmp_path).stderr


def _build(directory: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mkdocs", "build"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=120)
