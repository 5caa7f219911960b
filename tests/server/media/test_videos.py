"""What a video may be: real files through vLLM's loaders within our limits; no engine."""

import asyncio
import base64
import os
import random
import resource
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from vllm import envs
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO

from hidrop_server.control.arguments import parse
from hidrop_server.control.settings import SETTINGS
from hidrop_server.media import video_process, videos
from hidrop_server.media.connector import HidropMediaConnector, VideoDecoder
from hidrop_server.media.images import MediaRefused
from hidrop_server.media.video_process import FFMPEG_OPTIONS
from hidrop_server.media.videos import FRAME_LIST, VideoLimits
from tests.server.harness import damaged, picture
from tests.server.media.clips import CONCAT, EMPTY_MP4, PLAYLIST, clip, frame_list, recording
from tests.server.media.files import animated

LIMITS = VideoLimits(max_frames=32, max_seconds=300, max_megapixels=100, decode_seconds=30)
LOADERS = ("opencv", "qwen2_vl", "qwen3_vl", "opencv_dynamic", "glm46v")
"""vLLM's for LLaVA and InternVL, Qwen2-VL and Qwen2.5-VL, Qwen3-VL, GLM-4.1V, GLM-4.6V."""


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    envs.disable_envs_cache()  # an engine of an earlier test has frozen them
    for each in SETTINGS:
        if not each.name.startswith("--") and not each.embedded:
            monkeypatch.setenv(each.name, each.default)


def stock(loader: str, **options: Any) -> VideoMediaIO:
    return VideoMediaIO(ImageMediaIO(), video_backend=loader, **options)


def decode(
    file: bytes, loader: str = "opencv", limits: VideoLimits = LIMITS, **options: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """As a data: URL is decoded."""
    data = base64.b64encode(file).decode()
    frames, metadata = VideoDecoder(stock(loader, **options), limits).load_base64("video/mp4", data).media
    return frames, metadata


def refusal(file: bytes, loader: str = "opencv", limits: VideoLimits = LIMITS) -> str:
    with pytest.raises(MediaRefused) as caught:
        decode(file, loader, limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KINDS: dict[str, Callable[[], bytes]] = {
    "MP4": clip,
    "MOV": lambda: clip("mov"),
    "Matroska": lambda: clip("mkv"),
    "WebM, VP8": lambda: clip("webm", "VP80"),
    "WebM, VP9": lambda: clip("webm", "VP90"),
    "AVI, Motion JPEG": lambda: clip("avi", "MJPG"),
    "H.264 with sound": lambda: recording("with_sound.mp4"),
    "H.264, turned": lambda: recording("turned.mp4"),
    "H.264, trimmed by an edit list": lambda: recording("trimmed.mp4"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_is_named_is_read_as_stock_vllm_reads_it(kind: str, loader: str) -> None:
    file = KINDS[kind]()
    frames, metadata = decode(file, loader)
    wanted, stock_metadata = stock(loader).load_bytes(file).media
    np.testing.assert_array_equal(frames, wanted)
    assert metadata == stock_metadata
    assert len(frames) > 0


@pytest.mark.parametrize("loader", LOADERS)
def test_a_stream_that_a_browser_recorded_is_read_though_its_header_knows_no_length(loader: str) -> None:
    frames, metadata = decode(recording("streamed.webm"), loader)
    assert metadata["total_num_frames"] == 20
    assert len(frames) > 0


@pytest.mark.parametrize("loader", LOADERS)
def test_no_loader_samples_more_frames_than_may_be(loader: str) -> None:
    file = clip(num_frames=400, fps=5)
    frames, metadata = decode(file, loader, VideoLimits(8, 300, 100, 30), num_frames=-1)
    assert len(frames) <= 8
    places = metadata["frames_indices"]
    assert len(frames) == len(places) == len(set(places))
    assert places[0] == 0
    assert places[-1] >= 340, "of the whole video"


def test_what_the_user_asks_of_vllms_media_io_stands_below_the_limit() -> None:
    assert len(decode(clip(), num_frames=5)[0]) == 5
    assert len(decode(clip(), fps=2)[0]) == 4
    assert len(decode(clip(num_frames=50), num_frames=40)[0]) == 32


REFUSED: dict[str, tuple[str, Any]] = {
    "no bytes": ("not a video", lambda: b""),
    "a picture": ("not a video", picture),
    "an animated GIF": ("not a video", lambda: animated("GIF")),
    "a playlist": ("not a video", lambda: PLAYLIST),
    "a list of files": ("not a video", lambda: CONCAT),
    "half an MP4": ("cut off", lambda: clip()[: len(clip()) // 2]),
    "an MP4 without its last byte": ("cut off", lambda: clip()[:-1]),
    "half an AVI": ("cut off", lambda: clip("avi", "MJPG")[:2000]),
    "a WebM without its frames": ("no video stream", lambda: clip("webm", "VP80")[:60]),
    "an MP4 of nothing": ("no video stream", lambda: EMPTY_MP4),
    "a box without end": ("shorter than its header", lambda: EMPTY_MP4 + b"\0\0\0\1free"[:8].replace(b"\1", b"\3")),
    "sound alone": ("no video stream", lambda: recording("sound_alone.mp4")),
    "a codec that nobody sends": ("codec", lambda: clip("avi", "FFV1")),
    "a line": ("over 200 times", lambda: clip("avi", "MJPG", 2, (16, 4096))),
    "a video over its time": ("--max-video-seconds", lambda: clip(num_frames=31, fps=0.1)),
    "frames of too many pixels": ("--max-video-megapixels", lambda: clip(num_frames=32, size=(2048, 1600))),
    "a file over the limit": ("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", lambda: bytes((20 << 20) + 1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_in_a_line_that_says_why(name: str) -> None:
    says, make = REFUSED[name]
    assert says in refusal(make())


def test_a_frame_of_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "3000")
    assert "VLLM_MAX_IMAGE_PIXELS" in refusal(clip())


@pytest.mark.parametrize("loader", ["opencv", "qwen3_vl"])
def test_a_video_of_one_frame_is_read(loader: str) -> None:
    assert len(decode(clip(num_frames=1), loader)[0]) == 1


@pytest.mark.parametrize("loader", ["qwen2_vl", "opencv_dynamic", "glm46v"])
def test_a_video_of_one_frame_is_too_short_for_a_model_that_samples_in_pairs(loader: str) -> None:
    assert "too short for this model: 1 frames, 0.1 s" in refusal(clip(num_frames=1), loader)


def test_a_header_that_counts_more_frames_than_there_are_costs_nothing() -> None:
    """vLLM would try to read each of them."""
    file = clip("avi", "MJPG")
    place = file.index(b"strh") + 8 + 32  # the stream's length in frames
    lying = file[:place] + struct.pack("<I", 500_000_000) + file[place + 4 :]
    began = time.monotonic()
    for loader in LOADERS:
        frames, metadata = decode(lying, loader)
        assert metadata["total_num_frames"] == 20
        assert 1 < len(frames) <= 20
    assert time.monotonic() - began < 10


def test_decoding_is_ended_at_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "spins.py"
    limited = f"runpy.run_path({video_process.__file__!r})['limit_resources'](int(sys.argv[1]), int(sys.argv[2]))"
    program.write_text(f"import runpy, sys\n{limited}\nwhile True:\n    pass\n")
    monkeypatch.setattr(video_process, "__file__", str(program))
    assert "--max-video-decode-seconds" in refusal(clip(), limits=VideoLimits(32, 300, 100, 1))


def test_decoding_takes_no_more_memory_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "MEMORY_MIB", 8)
    assert refusal(clip(num_frames=2, size=(2048, 2048)))


def test_a_decoder_that_dies_is_the_files_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "dies.py"
    program.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(video_process, "__file__", str(program))
    assert "the decoder failed" in refusal(clip())


def test_damaged_files_are_refused_or_read_and_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rng = random.Random(7)
    files = [clip(), recording("with_sound.mp4"), clip("webm", "VP80"), clip("avi", "MJPG")]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    others = set(psutil.Process().children())  # a server of other tests
    before = os.listdir("/proc/self/fd")
    read = 0
    for index in range(40):
        with suppress(MediaRefused):
            frames, _ = decode(damaged(files[index % 4], rng), rng.choice(LOADERS))
            assert 1 <= len(frames) <= 32
            read += 1
    assert 0 < read < 40
    assert os.listdir("/proc/self/fd") == before
    assert set(psutil.Process().children()) <= others
    assert not [*tmp_path.iterdir()]


def test_memory_of_the_server_does_not_grow_with_refused_videos() -> None:
    file = clip(num_frames=32, size=(2048, 1600))
    refusal(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        refusal(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "KiB"


def test_the_decoder_knows_no_secret_and_no_format_that_reads_further_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    with videos.DecoderProcess(clip(), LIMITS) as process:
        environment = Path(f"/proc/{process.process.pid}/environ").read_bytes()
    assert b"a-secret" not in environment
    assert not {"hls", "concat", "dash", "sdp", "image2"} & set(FFMPEG_OPTIONS["format_whitelist"].split(","))
    monkeypatch.setattr(videos, "check_container", lambda data: data)
    with pytest.raises(MediaRefused, match="no video stream"), videos.DecoderProcess(PLAYLIST, LIMITS):
        pass


def decode_list(data: str, limits: VideoLimits = LIMITS) -> tuple[np.ndarray, dict[str, Any]]:
    frames, metadata = VideoDecoder(stock("opencv"), limits).load_base64(FRAME_LIST, data).media
    return frames, metadata


def test_a_list_of_frames_is_a_video() -> None:
    frames, metadata = decode_list(frame_list(5))
    assert frames.shape == (5, 32, 32, 3)
    assert metadata["frames_indices"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("says", "data"),
    [
        ("33 frames, over 32 (--max-video-frames)", frame_list(33)),
        ("not base64", frame_list(2) + ",%%"),
        ("not an image", frame_list(2) + ","),
        ("not an image", ""),
        ("not an image", base64.b64encode(EMPTY_MP4).decode()),
        ("more than one frame", base64.b64encode(animated("GIF")).decode()),
        ("different sizes", frame_list(2) + "," + frame_list(1, (48, 32))),
        ("--max-video-megapixels", frame_list(3, (1000, 1000))),
        ("over 200 times", frame_list(1, (1, 300))),
    ],
)
def test_a_list_of_frames_is_refused_in_a_line_that_says_why(says: str, data: str) -> None:
    with pytest.raises(MediaRefused) as caught:
        decode_list(data, VideoLimits(32, 300, 2, 30))
    assert says in str(caught.value)


def connector(**more: Any) -> HidropMediaConnector:
    return HidropMediaConnector(on_refused=lambda: None, videos=LIMITS, **more)


@pytest.mark.parametrize(
    ("says", "url"),
    [
        ("fetches no remote media", "http://127.0.0.1:1/clip.mp4"),
        ("reads no local files", "file:///etc/hostname"),
        ("base64", "data:video/mp4,xyz"),
        ("data or file URL", "ftp://example.org/clip.mp4"),
    ],
)
def test_a_videos_url_is_held_to_the_rules_of_images(says: str, url: str) -> None:
    with pytest.raises(MediaRefused, match=says):
        connector().fetch_video(url)
    with pytest.raises(MediaRefused, match=says):
        asyncio.run(connector().fetch_video_async(url))


def test_a_video_of_an_allowed_domain_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = connector(allowed_media_domains=["videos.example"])

    async def fetched(url: str, **limits: Any) -> bytes:
        assert (url, limits["timeout"]) == ("http://videos.example/clip.mp4", envs.VLLM_VIDEO_FETCH_TIMEOUT)
        return clip()

    monkeypatch.setattr(reader.connection, "async_get_bytes", fetched)
    frames, _ = asyncio.run(reader.fetch_video_async("http://videos.example/clip.mp4"))
    assert len(frames) == 20


def test_videos_are_decoded_beside_the_event_loop_a_few_at_once() -> None:
    url = "data:video/mp4;base64," + base64.b64encode(clip()).decode()
    running, most, ticks = 0, 0, 0

    async def main() -> list[Any]:
        nonlocal ticks
        at_once = asyncio.Semaphore(2)
        reader = connector(videos_at_once=at_once)
        tasks = [asyncio.create_task(reader.fetch_video_async(url)) for _ in range(5)]
        while not all(task.done() for task in tasks):
            ticks += 1
            await asyncio.sleep(0.01)
        return [await task for task in tasks]

    lock, start, end = threading.Lock(), videos.DecoderProcess.__init__, videos.DecoderProcess.end

    def starting(self: Any, *args: Any) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        start(self, *args)

    def ending(self: Any) -> None:
        nonlocal running
        end(self)
        with lock:
            running -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(videos.DecoderProcess, "__init__", starting)
        patch.setattr(videos.DecoderProcess, "end", ending)
        found = asyncio.run(main())
    assert [len(frames) for frames, _ in found] == [20] * 5
    assert most == 2
    assert ticks > 10


def test_the_limits_are_flags_and_a_model_with_videos_takes_one() -> None:
    args = parse("any/model", ["--max-video-frames", "8"])
    assert VideoLimits.of(args) == VideoLimits(8, 300, 100, 30)
    assert args.limit_mm_per_prompt == {"image": 16, "video": 1}
    assert parse("any/model", ["--limit-mm-per-prompt", '{"image": 3}']).limit_mm_per_prompt == {"image": 3, "video": 1}
    assert parse("any/model", ["--limit-mm-per-prompt.video", "2"]).limit_mm_per_prompt == {"image": 16, "video": 2}
