"""Pictures of any size, tiles and frames in the playground: what is sent, and which cells are lit."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.server.playground import browser as chrome
from tests.server.playground.stub import Stub, answering
from vllm_hidrop.plan.grid import Grid, Tile, square, tiled

pytestmark = [pytest.mark.server, pytest.mark.skipif(chrome.chromium_path() is None, reason=chrome.ADVICE)]

LIT = """tiles => {
  const canvas = document.getElementById("patches"), { width, height } = canvas;
  const at = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const lit = [];
  for (const { start, columns, rows, stride, box: [left, top, right, bottom] } of tiles) {
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
      const x = (left + (right - left) * (column + .5) / columns) * width;
      const y = (top + (bottom - top) * (row + .5) / rows) * height;
      if (at[4 * (Math.floor(y) * width + Math.floor(x)) + 3] === 0) lit.push(start + row * stride + column);
    }
  }
  return lit.sort((a, b) => a - b);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chrome.chromium() as started:
        yield started


def choose_picture(page: Page, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Choose a picture of noise, without colours that a browser may change; returns its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()})
    expect(page.get_by_role("img", name="Picture a.png")).to_be_visible()
    return pixels


def lit(page: Page, *tiles: Tile) -> list[int]:
    found: list[int] = page.evaluate(LIT, [tile.dump() for tile in tiles])
    return found


def part(body: dict[str, Any]) -> dict[str, Any]:
    """The image or video of a request."""
    found: dict[str, Any] = body["messages"][0]["content"][0]
    return found


def ratio(page: Page, selector: str) -> float:
    box = page.locator(selector).bounding_box()
    assert box is not None
    return box["width"] / box["height"]


@pytest.mark.parametrize("size", [(120, 72), (60, 140)])
def test_a_picture_of_any_shape_is_sent_as_it_is_and_its_cells_are_lit(browser: Browser, size: tuple[int, int]) -> None:
    tile = Tile(0, 5, 3, 6)  # a separator behind every row
    kept = [0, 3, 8, 11, 13, 16]
    stub = Stub([Grid((tile,))], [kept], num_tokens=17)
    with answering(stub), chrome.playground(browser, stub.url) as page:
        expect(page.locator("#fitting")).to_contain_text("It is sent as you see it: whole, no side over 1024 pixels.")
        pixels = choose_picture(page, size)
        chrome.ask(page)
        file = base64.b64decode(part(stub.asked[-1])["image_url"]["url"].split(",")[1])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")), pixels)
        assert ratio(page, "#picture") == pytest.approx(size[0] / size[1], rel=0.02)
        assert ratio(page, "#patches") == pytest.approx(ratio(page, "#picture"), rel=0.02)
        assert lit(page, tile) == [0, 3, 8, 13, 16], "a separator has no cell"
        expect(page.locator("#shown")).to_contain_text("6 of 17 patches; 5 of the 15 cells shown")
        chrome.go_to_stage(page, 0)
        assert len(lit(page, tile)) == 15


def test_tiles_and_the_picture_in_small_are_shown_one_or_the_other(browser: Browser) -> None:
    grid = Grid(tiled((0, 16, 32, 48), 2, 16), square(16, 64))
    kept = [1, 18, 40, 63, 64, 79]
    stub = Stub([grid], [kept], num_tokens=80)
    with answering(stub), chrome.playground(browser, stub.url) as page:
        choose_picture(page, (100, 60))
        expect(page.get_by_label("Show the tokens of")).to_be_hidden()
        chrome.ask(page)
        assert lit(page, *grid.tiles) == [1, 18, 40, 63]
        expect(page.locator("#shown")).to_contain_text("4 of the 64 cells shown")
        page.get_by_label("Show the tokens of").select_option("the picture in small")
        assert grid.whole is not None
        assert lit(page, grid.whole) == [64, 79]
        expect(page.locator("#shown")).to_contain_text("2 of the 16 cells shown")


def test_a_cropped_grid_lies_on_the_centre_square(browser: Browser) -> None:
    stub = Stub([Grid((square(4),), is_cropped=True)], [[0, 3]], num_tokens=4)
    with answering(stub), chrome.playground(browser, stub.url) as page:
        choose_picture(page, (200, 100))
        chrome.ask(page)
        assert lit(page, Tile(0, 2, 2, 2, (0.25, 0, 0.75, 1))) == [0, 3]
        assert lit(page, Tile(0, 1, 1, 1, (0, 0, 0.25, 1)), Tile(1, 1, 1, 1, (0.75, 0, 1, 1))) == []


def test_where_the_grid_is_not_known_none_is_drawn_and_it_is_said(browser: Browser) -> None:
    stub = Stub([None], [[0, 3]], num_tokens=4)
    with answering(stub), chrome.playground(browser, stub.url) as page:
        chrome.ask(page)
        expect(page.locator("#shown")).to_contain_text("where they lie is not known, so none is drawn")
        assert len(lit(page, square(16))) == 16, "nothing is dimmed"


def recording(path: Path, num_frames: int, size: tuple[int, int]) -> bytes:
    """A video that grows brighter, frame by frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"VP80"), 4, size)
    for frame in range(num_frames):
        writer.write(np.full((size[1], size[0], 3), 255 * frame // (num_frames - 1), dtype=np.uint8))
    writer.release()
    return path.read_bytes()


GREY = """() => {
  const canvas = document.getElementById("picture");
  return canvas.getContext("2d").getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data[0];
}"""


def wait_for_grey(page: Page, level: int) -> None:
    """Until the frame is drawn; the page's policy lets Playwright wait for no expression."""
    found = []
    for _ in range(100):
        found.append(page.evaluate(GREY))
        if abs(found[-1] - level) < 20:
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{level} was never shown: {found}")


def test_a_video_is_sent_as_it_is_and_shown_frame_by_frame(browser: Browser, tmp_path: Path) -> None:
    file = recording(tmp_path / "grows.webm", 16, (96, 64))
    tile = Tile(0, 3, 2, 3)
    stub = Stub([Grid((tile,))] * 4, [[0], [1, 2], [], [5]], num_tokens=6, modalities=("image", "video"))
    with answering(stub), chrome.playground(browser, stub.url) as page:
        page.locator("#video").set_input_files({"name": "grows.webm", "mimeType": "video/webm", "buffer": file})
        expect(page.locator("#status")).to_have_text("grows.webm is ready.")
        expect(page.get_by_role("img", name="Video grows.webm")).to_be_visible()
        chrome.ask(page)
        assert base64.b64decode(part(stub.asked[-1])["video_url"]["url"].split(",")[1]) == file
        assert ratio(page, "#picture") == pytest.approx(1.5, rel=0.02)
        slider = page.get_by_role("slider", name="Frame")
        slider.press("Home")
        for frame, kept in enumerate(stub.kept):
            expect(page.locator("#frame-shown")).to_have_text(
                re.compile(f"^Frame {frame + 1} of 4, about second [0-9.]+$")
            )
            wait_for_grey(page, 255 * (4 * frame + 2) // 15)
            assert lit(page, tile) == list(kept)
            expect(page.locator("#shown")).to_contain_text(f"4 of 24 patches; in this frame {len(kept)} of 6")
            slider.press("ArrowRight")
        choose_picture(page, (40, 40))
        expect(slider).to_be_hidden()
        chrome.ask(page)
        assert "image_url" in part(stub.asked[-1])


def test_a_video_that_the_browser_cannot_show_is_sent_all_the_same(browser: Browser) -> None:
    stub = Stub([Grid((square(4),))] * 2, [[0], [1]], num_tokens=4, modalities=("video",))
    with answering(stub), chrome.playground(browser, stub.url) as page:
        expect(page.get_by_text("Choose a picture")).to_be_hidden()
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_role("alert")).to_have_text("Choose a video first: this model takes no pictures.")
        page.locator("#video").set_input_files({"name": "a.avi", "mimeType": "video/avi", "buffer": b"RIFF"})
        expect(page.locator("#status")).to_have_text("a.avi will be sent, but this browser cannot show it.")
        chrome.ask(page)
        assert part(stub.asked[-1])["video_url"]["url"].endswith(base64.b64encode(b"RIFF").decode())
        expect(page.locator("#frame-shown")).to_have_text("Frame 1 of 2")
        assert lit(page, square(4)) == [0]


def test_videos_are_not_offered_where_the_model_takes_none(browser: Browser) -> None:
    stub = Stub([Grid((square(4),))], [[0]], num_tokens=4, pictures="squares")
    with answering(stub), chrome.playground(browser, stub.url) as page:
        expect(page.get_by_text("Choose a video")).to_be_hidden()
        choose_picture(page, (50, 20))
        assert ratio(page, "#picture") == pytest.approx(1, rel=0.02)
