"""The playground, clicked and typed through in a headless Chromium against real servers."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from playwright.sync_api import Browser, Page, Request, Response, expect

from hidrop_server.playground.page import build, router
from tests.server.harness import IMAGE_TOKENS, Server, image_url
from tests.server.playground import browser as chrome

EXAMPLES = Path(__file__).parents[3] / "examples"
needs_chromium = pytest.mark.skipif(chrome.chromium_path() is None, reason=chrome.ADVICE)
in_browser = [pytest.mark.server, needs_chromium]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chrome.chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with chrome.playground(browser, server.url) as opened:
        yield opened


def chats(page: Page) -> list[Response]:
    """Fills with the answers to the questions that the page asks from now on; those to warm up are for one token."""
    found: list[Response] = []

    def note(response: Response) -> None:
        if response.url.endswith("/v1/chat/completions") and '"max_tokens":1,' not in (
            response.request.post_data or ""
        ):
            found.append(response)

    page.on("response", note)
    return found


def report_in(response: Response) -> dict[str, Any]:
    lines = [line.removeprefix("data: ") for line in response.text().splitlines() if line.startswith("data: {")]
    report: dict[str, Any] = json.loads(lines[-1])["hidrop"]
    return report


LIT = """grid => {
  const canvas = document.getElementById("patches"), side = canvas.width / grid;
  const at = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.width).data;
  const middle = (i) => Math.floor((i + .5) * side);
  const isLit = (p) => at[4 * (middle(Math.floor(p / grid)) * canvas.width + middle(p % grid)) + 3] === 0;
  return [...Array(grid * grid).keys()].filter(isLit);
}"""


TIMES = ("Time to first token", "Time to the end")
UNITS = {" GFLOP": 1e9, " MB": 1e6}


def numbers(page: Page, heading: str) -> list[str]:
    row = page.get_by_role("table", name="What both answers took").get_by_role("row").filter(has_text=heading)
    return [text.replace(",", "") for text in row.get_by_role("cell").all_inner_texts()]


def saved_percent(report: dict[str, Any], key: str) -> Any:
    """As shown, to one decimal."""
    return pytest.approx(100 * (1 - report[key] / report[f"{key}_dense"]), abs=0.051)


def percent_in(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-").removesuffix(" %"))


def tiles(page: Page) -> dict[str, str]:
    """Heading and percentage of every saving."""
    tiles = page.locator("#savings > div").all()
    return {tile.locator("dt").inner_text(): tile.locator("dd").first.inner_text() for tile in tiles}


class TestClickingThrough:
    pytestmark = in_browser

    def test_the_example_is_answered_and_the_kept_patches_are_lit_stage_by_stage(self, page: Page) -> None:
        answers = chats(page)
        expect(page.locator("#about")).to_contain_text("method hidrop, preset embedded, 12 layers in 5 stages")
        chrome.ask(page)
        expect(page.locator("#pruned")).to_have_text("yellow")
        expect(page.locator("#off")).to_have_text("yellow")
        pruned, off = (report_in(answer) for answer in answers)
        assert (pruned["mode"], off["mode"]) == ("pruned", "off")
        slider = page.get_by_role("slider", name="Stage")
        assert slider.input_value() == "2", "the first stage that cuts"
        for index, stage in enumerate(pruned["stages"]):
            chrome.go_to_stage(page, index)
            said = f"{stage['kept']} of {IMAGE_TOKENS} patches"
            assert said in (slider.get_attribute("aria-valuetext") or "")
            expect(page.locator("#shown")).to_contain_text(said)
            assert page.evaluate(LIT, 24) == stage["patches"][0]
            row = page.locator("#stages tr[aria-current=true] td")
            assert row.all_inner_texts()[1:] == [str(stage[key]) for key in ("kept", "cached", "kv_blocks")]
        assert [len(stage["patches"][0]) for stage in pruned["stages"]] == [0, 576, 96, 24, 0]
        assert numbers(page, "KV blocks held")[:2] == [str(pruned["kv_blocks"]), str(off["kv_blocks"])]
        assert numbers(page, "Rows run")[:2] == [str(pruned["layer_tokens"]), str(off["layer_tokens"])]
        assert numbers(page, "mean over the layers")[:2] == ["64", "576"]
        assert numbers(page, "mean over the layers")[2] == "88.9 %"
        for heading, key, unit in (
            ("Prefill compute", "prefill_flops", " GFLOP"),
            ("KV cache held", "kv_bytes", " MB"),
        ):
            *both, saved = numbers(page, heading)
            for cell, report in zip(both, (pruned, off), strict=True):
                assert float(cell.removesuffix(unit)) * UNITS[unit] == pytest.approx(report[key], rel=0.005)
            assert percent_in(saved) == saved_percent(pruned, key), "off runs what the report calls dense"
            assert -percent_in(tiles(page)[heading.removesuffix(" held")]) == saved_percent(pruned, key)
        assert percent_in(tiles(page)["Vision tokens, mean"]) == -88.9
        first, _ = times = [[float(c.removesuffix(" ms")) for c in numbers(page, t)[:2]] for t in TIMES]
        assert all(time > 0 for pair in times for time in pair)
        assert percent_in(tiles(page)["First token"]) == pytest.approx(100 * (first[0] / first[1] - 1), abs=1)

    def test_a_bar_of_the_chart_can_be_clicked(self, page: Page) -> None:
        chrome.ask(page)
        page.locator("#chart div").nth(3).click(position={"x": 3, "y": 60})
        expect(page.get_by_role("slider", name="Stage")).to_have_value("3")
        assert len(page.evaluate(LIT, 24)) == 24

    def test_a_chosen_file_is_sent_as_it_is(self, page: Page) -> None:
        page.locator("#file").set_input_files(EXAMPLES / "scene_2.png")
        expect(page.get_by_role("img", name="Picture scene_2.png")).to_be_visible()
        page.get_by_label("Question", exact=True).fill("What colour is the sun?")
        with page.expect_request("**/v1/chat/completions") as asked:
            page.get_by_label("Question", exact=True).press("Enter")
        chrome.wait(page)
        expect(page.locator("#pruned")).to_have_text("cyan")
        with Image.open(EXAMPLES / "scene_2.png") as original:
            assert np.array_equal(sent(asked.value), np.asarray(original.convert("RGB")))

    def test_a_dropped_picture_is_padded_to_a_square(self, page: Page) -> None:
        wide = Image.new("RGB", (100, 40), (250, 90, 200))
        drop(page, wide)
        expect(page.get_by_role("img", name="Picture wide.png")).to_be_visible()
        with page.expect_request("**/v1/chat/completions") as asked:
            chrome.ask(page)
        pixels = sent(asked.value)
        assert pixels.shape == (100, 100, 3)
        assert np.array_equal(pixels[30:70], np.asarray(wide))
        assert (pixels[:30] == 127).all()
        assert (pixels[70:] == 127).all()

    def test_a_second_picture_forgets_what_was_shown_of_the_first(self, page: Page) -> None:
        chrome.ask(page)
        assert len(page.evaluate(LIT, 24)) == 96
        page.get_by_role("button", name="Example picture").click()
        assert len(page.evaluate(LIT, 24)) == 576
        expect(page.get_by_role("slider", name="Stage")).to_be_disabled()
        for card in ("#numbers-card", "#savings-card", "#stages-card"):
            expect(page.locator(card)).to_be_hidden()

    def test_without_the_comparison_one_request_is_sent(self, page: Page) -> None:
        answers = chats(page)
        page.get_by_label("Ask again with every vision token (off)").uncheck()
        chrome.ask(page)
        assert len(answers) == 1
        assert numbers(page, "KV blocks held")[1:] == ["-", "-"]
        assert list(tiles(page)) == ["KV cache", "Prefill compute", "Vision tokens, mean"], "times need the comparison"

    def test_keeps_are_asked_for_as_they_are_written(self, page: Page) -> None:
        answers = chats(page)
        keep = page.get_by_label("Keep per stage")
        expect(keep).to_have_attribute("placeholder", "0, all, 96, 24, 0")
        keep.fill("0, 100 %, 12.5%, 0.01, 0")
        with page.expect_request(lambda request: '"hidrop_keep"' in (request.post_data or "")) as asked:
            chrome.ask(page)
        wished = json.loads(asked.value.post_data or "")["vllm_xargs"]["hidrop_keep"]
        assert wished == [0, "all", 0.125, 0.01, 0]
        pruned, off = (report_in(answer) for answer in answers)
        assert [stage["kept"] for stage in pruned["stages"]] == [0, 576, 72, 5, 0]
        assert (off["mode"], off["stages"][2]["kept"]) == ("off", 576)

    def test_keeps_that_the_server_refuses_are_told(self, browser: Browser, server: Server) -> None:
        with chrome.playground(browser, server.url, forgives="400 (Bad Request)") as page:
            page.get_by_label("Keep per stage").fill("all, some")
            page.get_by_role("button", name="Ask", exact=True).click()
            expect(page.get_by_role("alert")).to_contain_text("hidrop_keep")

    def test_the_example_of_keeps_is_the_chosen_methods(self, page: Page) -> None:
        methods = page.locator("#method option").all_inner_texts()
        other = next(name for name in methods if name != "hidrop")
        page.get_by_label("Method").select_option(other)
        expect(page.get_by_label("Keep per stage")).to_have_attribute("placeholder", "the method's own")

    def test_an_empty_number_of_tokens_leaves_the_length_to_the_server(self, page: Page) -> None:
        answers = chats(page)
        page.get_by_label("Most tokens").fill("")
        chrome.ask(page)
        assert len(answers) == 2
        assert all("max_tokens" not in json.loads(each.request.post_data or "") for each in answers)
        expect(page.locator("#pruned")).to_have_text("yellow")

    def test_a_file_that_is_no_picture_is_told(self, page: Page) -> None:
        page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
        expect(page.get_by_role("alert")).to_have_text("a.png is not a picture that this browser can read.")

    def test_what_the_server_refuses_is_told(self, browser: Browser, server: Server) -> None:
        with chrome.playground(browser, server.url, forgives="400 (Bad Request)") as page:
            page.get_by_label("Question", exact=True).fill("red " * 4096)
            page.get_by_role("button", name="Ask", exact=True).click()
            expect(page.get_by_role("alert")).to_contain_text("400: ")
            expect(page.get_by_role("alert")).to_contain_text("4096")

    def test_a_question_can_be_stopped(self, page: Page) -> None:
        page.route("**/v1/chat/completions", lambda route: None)  # it is never answered
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#status")).to_have_text("Stopped.")
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_focused()
        expect(page.get_by_role("alert")).to_be_hidden()

    def test_a_server_with_a_key_is_asked_with_it_and_it_is_kept_nowhere(
        self, browser: Browser, guarded: Server
    ) -> None:
        with chrome.playground(browser, guarded.url, forgives="401 (Unauthorized)") as page:
            expect(page.get_by_label("API key")).to_be_focused()
            page.get_by_label("API key").fill(guarded.key)
            page.get_by_label("API key").press("Enter")
            chrome.wait(page)
            expect(page.locator("#about")).to_contain_text("tiny: method pyramiddrop")
            chrome.go_to_stage(page, 1)
            assert len(page.evaluate(LIT, 8)) == 32
            assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
            page.reload()
            expect(page.get_by_label("API key")).to_have_value("")

    def test_a_server_without_a_key_is_not_asked_for_one(self, page: Page) -> None:
        expect(page.get_by_label("API key")).to_be_hidden()


def sent(request: Request) -> Any:
    """Pixels of the picture in a request."""
    content = json.loads(request.post_data or "")["messages"][0]["content"]
    file = base64.b64decode(content[0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def drop(page: Page, image: Image.Image) -> None:
    file = io.BytesIO()
    image.save(file, "PNG")
    transfer = page.evaluate_handle(
        """base64 => {
          const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
          transfer.items.add(new File([bytes], "wide.png", { type: "image/png" }));
          return transfer;
        }""",
        base64.b64encode(file.getvalue()).decode(),
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


CONTRASTS = """() => {
  const parse = (text) => text.match(/[0-9.]+/g).map(Number);
  const channel = (c) => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    throw new Error("no background");
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest("script")) continue;
    const [a, b] = [parse(getComputedStyle(element).color), ground(element)].map(luminance).sort((x, y) => y - x);
    found.push([walker.currentNode.data.trim().slice(0, 40), (a + .05) / (b + .05)]);
  }
  for (const field of document.querySelectorAll("[placeholder]")) {
    const written = parse(getComputedStyle(field, "::placeholder").color);
    const [a, b] = [written, ground(field)].map(luminance).sort((x, y) => y - x);
    found.push([field.placeholder, (a + .05) / (b + .05)]);
  }
  return found;
}"""


class TestForEveryone:
    pytestmark = in_browser

    def test_it_is_used_with_a_keyboard_alone_in_an_order_that_makes_sense(self, page: Page) -> None:
        stops = ["file", "example", "question", "method", "most", "keep", "compare", "ask"]
        for stop in stops:
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.id") == stop
        page.keyboard.press("Enter")
        chrome.wait(page)
        expect(page.locator("#pruned")).to_have_text("yellow")
        for stop in ("compare", "keep", "most", "method", "question", "stages-part", "stage"):
            page.keyboard.press("Shift+Tab")
            assert page.evaluate("document.activeElement.id") == stop
        page.keyboard.press("ArrowRight")
        assert len(page.evaluate(LIT, 24)) == 24

    def test_focus_is_seen(self, page: Page) -> None:
        for _ in range(8):
            page.keyboard.press("Tab")
            seen = "e => getComputedStyle(e.matches('.file') ? e.nextElementSibling : e).outlineStyle"
            assert page.evaluate(f"({seen})(document.activeElement)") == "solid"

    def test_a_screen_reader_hears_names_and_answers(self, page: Page) -> None:
        chrome.ask(page)
        heard = page.locator("body").aria_snapshot()
        for line in (
            '- heading "Playground" [level=1]',
            'img "Example picture: a yellow star, a blue triangle, a white square and a red circle on grey"',
            '- slider "Stage"',
            '- textbox "Question"',
            '- combobox "Method"',
            '- spinbutton "Most tokens"',
            '- textbox "Keep per stage"',
            '- checkbox "Ask again with every vision token (off)"',
            '- button "Ask"',
            '- table "What both answers took"',
            '- table "Stages of the pruned answer"',
            '- article "Pruned"',
        ):
            assert line in heard, heard
        for answer in ("#pruned", "#off"):
            expect(page.locator(answer)).to_have_attribute("aria-busy", "false")

    def test_a_screen_reader_hears_the_answers_once_and_not_token_by_token(self, page: Page) -> None:
        page.evaluate(
            """() => {
              window.heard = [];
              const live = "[aria-live], [role=status], [role=alert], [role=log]";
              const note = (changes) => changes.forEach(({ target }) => {
                const element = target.nodeType === Node.TEXT_NODE ? target.parentElement : target;
                const region = element?.closest(live);
                if (region && region.textContent) window.heard.push([region.id, region.textContent]);
              });
              const all = { childList: true, characterData: true, subtree: true };
              new MutationObserver(note).observe(document.body, all);
            }"""
        )
        page.get_by_label("Question", exact=True).fill("What colour is the star? What colour is the circle?")
        page.get_by_label("Most tokens").fill("24")
        chrome.ask(page)
        expect(page.locator("#heard")).to_contain_text("Pruned: ")
        heard = page.evaluate("window.heard")
        answers = [page.locator(answer).inner_text() for answer in ("#pruned", "#off")]
        assert [text for name, text in heard if name == "heard"] == [
            f"Pruned: {answers[0]} With every vision token: {answers[1]}"
        ]
        assert {name for name, _ in heard} <= {"heard", "status"}

    @pytest.mark.parametrize("scheme", ["dark", "light"])
    def test_text_stands_out(self, browser: Browser, server: Server, scheme: str) -> None:
        with chrome.playground(browser, server.url, color_scheme=scheme) as page:
            chrome.ask(page)
            page.evaluate("fail('An error.')")
            found = page.evaluate(CONTRASTS)
        assert len(found) > 40
        assert [text for text, contrast in found if contrast < 4.5] == []

    @pytest.mark.parametrize(("wish", "duration"), [("reduce", "0s"), ("no-preference", "0.15s")])
    def test_nothing_moves_for_those_who_do_not_want_it(
        self, browser: Browser, server: Server, wish: str, duration: str
    ) -> None:
        with chrome.playground(browser, server.url, reduced_motion=wish) as page:
            moves = page.evaluate("getComputedStyle(document.getElementById('ask')).transitionDuration")
        assert moves == duration

    def test_a_narrow_screen_does_not_scroll_sideways(self, browser: Browser, server: Server) -> None:
        with chrome.playground(browser, server.url, viewport={"width": 360, "height": 740}) as page:
            chrome.ask(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360

    def test_a_script_that_is_not_the_pages_own_does_not_run(self, browser: Browser, server: Server) -> None:
        with chrome.playground(browser, server.url, forgives="") as page:
            page.evaluate(
                """() => {
                  const script = document.createElement("script");
                  try { script.textContent = "window.ran = 1"; } catch { return; }
                  document.body.append(script);
                }"""
            )
            assert page.evaluate("window.ran === undefined")
            inline = "document.body.setAttribute('onclick', 'window.ran = 1'); document.body.click()"
            page.evaluate(f"() => {{ try {{ {inline} }} catch {{ }} }}")
            assert page.evaluate("window.ran === undefined")


@pytest.fixture(scope="module")
def alone() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(router)
    with TestClient(app) as client:
        yield client


def test_the_policy_lets_the_page_do_what_it_needs_and_no_more(alone: TestClient) -> None:
    headers = alone.get("/playground").headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    for tag in ("script", "style"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[f"{tag}-src"])
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-type"] == "text/html; charset=utf-8"


def test_the_page_brings_everything_with_it() -> None:
    text, _ = build()
    assert re.findall(r"https?://|//[a-z]|@import|url\(", text) == []
    assert re.findall(r"\bon[a-z]+=|\bstyle=|innerHTML|document\.write|eval\(|localStorage|sessionStorage", text) == []
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]
    assert "Math.random" not in text


@pytest.mark.server
def test_the_page_is_served_beside_the_routes_that_it_asks(server: Server) -> None:
    assert server.http.get("/playground").text == build()[0]
    body = server.body([image_url()], vllm_xargs={"hidrop_explain": True})
    assert server.http.post("/v1/chat/completions", json=body).json()["hidrop"]["stages"][2]["patches"]
