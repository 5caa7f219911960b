"""Videos over HTTP to a model that takes them: pruned and reported, and what is refused holds up nobody."""

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.server.conftest import serving
from tests.server.harness import Server, image_url, kept
from tests.server.media.clips import PLAYLIST, clip, frame_list, recording
from tests.server.playground import browser as chrome
from tests.server.playground.test_grids import choose_picture, lit
from tests.server.playground.test_playground import chats, report_in
from vllm_hidrop.plan.grid import Tile

pytestmark = pytest.mark.server

FLAGS = (
    "--dtype",
    "float32",
    "--max-model-len",
    "1024",
    "--block-size",
    "32",
    "--enforce-eager",
    "--kv-cache-memory-bytes",
    str(1 << 28),
)


@pytest.fixture(scope="module")
def qwen(checkpoint: Callable[[str], Path]) -> Iterator[Server]:
    with serving([str(checkpoint("qwen2_5_vl")), "--method", "fastv", *FLAGS]) as started:
        yield started


def video(file: bytes) -> dict[str, Any]:
    return part(f"data:video/mp4;base64,{base64.b64encode(file).decode()}")


def part(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def body(server: Server, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    question = {"type": "text", "text": "what is this ?"}
    content = [*parts, question]
    return server.body([], **more) | {"messages": [{"role": "user", "content": content}]}


def answer(server: Server, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = server.http.post("/v1/chat/completions", json=body(server, *parts, **more))
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_a_video_is_pruned_and_reported(qwen: Server) -> None:
    """20 frames at 10 a second are 4 at 2 a second, in two pairs of 4 x 3 tokens of 16 x 16 pixels."""
    report = answer(qwen, video(clip()))["hidrop"]
    assert (report["mode"], report["vision_tokens"]) == ("pruned", 24)
    first, *later = kept(report)
    assert first == 24
    assert later == [12] * len(later)
    dense = answer(qwen, video(clip()), vllm_xargs={"hidrop": "off"})["hidrop"]
    assert set(kept(dense)) == {24}


def test_videos_and_images_go_together_and_sound_is_ignored(qwen: Server) -> None:
    image = {"type": "image_url", "image_url": {"url": image_url()}}
    alone = answer(qwen, image)["hidrop"]["vision_tokens"]
    assert answer(qwen, video(clip()), image)["hidrop"]["vision_tokens"] == alone + 24
    assert answer(qwen, video(recording("with_sound.mp4")))["hidrop"]["vision_tokens"] == 12


def test_a_list_of_frames_is_a_video(qwen: Server) -> None:
    url = f"data:video/jpeg;base64,{frame_list(4, (64, 48))}"
    assert answer(qwen, part(url))["hidrop"]["vision_tokens"] == 24


BAD: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "two videos": ("At most 1 video", [video(clip()), video(clip())]),
    "no video": ("not a video", [video(b"hello")]),
    "half a video": ("cut off", [video(clip()[:1500])]),
    "a playlist": ("not a video", [video(PLAYLIST)]),
    "sound alone": ("no video stream", [video(recording("sound_alone.mp4"))]),
    "a single frame": ("too short", [video(clip(num_frames=1))]),
    "too long": ("--max-video-seconds", [video(clip(num_frames=31, fps=0.1))]),
    "too many frames of a list": ("--max-video-frames", [part(f"data:video/jpeg;base64,{frame_list(33)}")]),
    "a URL": ("no remote media", [part("http://127.0.0.1:9/clip.mp4")]),
    "a file of the server": ("no local files", [part("file:///etc/hostname")]),
    "sound": ("takes no audio", [{"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}}]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_video_is_a_400_that_says_so(qwen: Server, name: str) -> None:
    says, parts = BAD[name]
    before = qwen.metric("vllm_hidrop_refused_requests_total", reason="media")
    response = qwen.http.post("/v1/chat/completions", json=body(qwen, *parts))
    assert response.status_code == 400, response.text
    assert says in response.json()["error"]["message"]
    assert qwen.metric("vllm_hidrop_refused_requests_total", reason="media") == before + (name != "two videos")


def test_a_request_cannot_raise_the_number_of_frames(qwen: Server) -> None:
    more = {"media_io_kwargs": {"video": {"fps": 30, "max_frames": 700}}}
    response = qwen.http.post("/v1/chat/completions", json=body(qwen, video(clip()), **more))
    assert response.status_code == 400
    assert "media_io_kwargs" in response.text


def test_bad_videos_hold_up_no_good_ones_and_leave_no_process(qwen: Server) -> None:
    files = [clip(), clip()[:1500], recording("with_sound.mp4"), b"hello"] * 6
    with ThreadPoolExecutor(8) as pool:
        posts = [pool.submit(qwen.http.post, "/v1/chat/completions", json=body(qwen, video(file))) for file in files]
    assert [post.result().status_code for post in posts] == [200, 400, 200, 400] * 6
    assert qwen.http.get("/ready").status_code == 200
    names = [" ".join(each.cmdline()) for each in psutil.Process().children(recursive=True)]
    assert not [name for name in names if "video_process" in name]


@pytest.mark.skipif(chrome.chromium_path() is None, reason=chrome.ADVICE)
def test_the_playground_lights_what_was_kept_of_a_picture_and_of_every_frame(qwen: Server) -> None:
    with chrome.chromium() as browser, chrome.playground(browser, qwen.url) as page:
        answers = chats(page)
        choose_picture(page, (112, 80))
        chrome.ask(page)
        pruned = report_in(answers[0])
        assert lit(page, Tile(0, 7, 5, 7)) == pruned["stages"][1]["patches"][0]
        assert len(lit(page, Tile(0, 7, 5, 7))) == 17
        file = {"name": "a.webm", "mimeType": "video/webm", "buffer": clip("webm", "VP80")}
        page.locator("#video").set_input_files(file)  # type: ignore[arg-type]
        page.get_by_role("img", name="Video a.webm").wait_for()
        chrome.ask(page)
        of_frames = report_in(answers[2])["stages"][1]["patches"]
        assert list(map(len, of_frames)) == [6, 6]
        for frame, kept_of_frame in enumerate(of_frames):
            page.get_by_role("slider", name="Frame").press("End" if frame else "Home")
            assert lit(page, Tile(0, 4, 3, 4)) == kept_of_frame
