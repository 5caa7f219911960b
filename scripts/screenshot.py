"""Make docs/playground.png: the playground after a question about an example picture, in a headless Chromium.

``make screenshots``, or ``python -m scripts.screenshot [--url URL] [--out FILE]``; without a URL it starts a server of
its own. Chromium comes from ``scripts/chromium.sh``.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

from tests.server.playground.browser import ask, chromium, go_to_stage, playground
from vllm_hidrop.cli.local_server import local_server

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "examples" / "scene_2.png"
QUESTION = "What colour is the sun?"
STAGE = 2


def main() -> None:
    """Ask once so that the times shown are not those of a first request, then ask and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server (default: start one with the embedded model)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "playground.png")
    options = parser.parse_args()
    server = nullcontext(options.url) if options.url else local_server([], on_wait=lambda: None)
    with (
        server as url,
        chromium() as browser,
        playground(browser, url, viewport={"width": 1200, "height": 900}, color_scheme="dark") as page,
    ):
        page.locator("#file").set_input_files(PICTURE)
        page.get_by_label("Question", exact=True).fill(QUESTION)
        ask(page)
        ask(page)
        go_to_stage(page, STAGE)
        page.screenshot(path=options.out, full_page=True)


if __name__ == "__main__":
    main()
