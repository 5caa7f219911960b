"""What a video file may be, read from its header before a frame is decoded, and vLLM's loaders within these limits."""

import io
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, ClassVar, Self, cast

import numpy as np
from PIL import Image
from vllm import envs
from vllm.multimodal.video import VideoBackend
from vllm.multimodal.video_decoders import VideoSourceMetadata, VideoTargetMetadata, resolve_video_backend_kwargs

from hidrop_server.media import video_process
from hidrop_server.media.images import FORMATS as IMAGE_FORMATS
from hidrop_server.media.images import MAX_ASPECT_RATIO, MediaRefused

FORMATS = "MP4, MOV, WebM, Matroska, AVI"
FRAME_LIST = "video/jpeg"  # vLLM's type of a data: URL that holds a video as a list of JPEG files, comma between them
MEMORY_MIB = 1024  # what decoding one video may add to its process
VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LANG")
"""Variables that the decoder's process gets: none of the server's secrets."""


@dataclass(frozen=True)
class VideoLimits:
    """Limits of one video; the flags of `control.settings` with these names."""

    max_frames: int  # sampled
    max_seconds: int  # of its duration
    max_megapixels: int  # of all sampled frames together
    decode_seconds: int  # CPU time

    @classmethod
    def of(cls, args: Namespace) -> Self:
        """The limits that the command line gives."""
        return cls(
            args.max_video_frames, args.max_video_seconds, args.max_video_megapixels, args.max_video_decode_seconds
        )


def check_container(data: bytes) -> bytes:
    """Check that a file is of a format we read, by its content, and whole; returns it, MediaRefused says what is wrong.

    Matroska and WebM are not checked for being whole: a stream may end anywhere.
    """
    if data[4:8] == b"ftyp" or data[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):  # old MOV has no ftyp
        claimed = _end_of_boxes(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        claimed = 8 + int.from_bytes(data[4:8], "little")
    elif data[:4] == b"\x1a\x45\xdf\xa3":
        claimed = len(data)
    else:
        raise MediaRefused(f"not a video this server reads: {FORMATS}")
    if claimed > len(data):
        raise MediaRefused(f"the video is cut off: {len(data)} of {claimed} bytes are there")
    return data


def check_num_frames(num_frames: int, limits: VideoLimits) -> None:
    """Check how many frames a list has, none of which would be left out; MediaRefused if there are too many."""
    if num_frames > limits.max_frames:
        raise MediaRefused(f"the video has {num_frames} frames, over {limits.max_frames} (--max-video-frames)")


def check_frame_list(files: Sequence[bytes], limits: VideoLimits) -> None:
    """Check a video that was sent as a list of image files, by their headers; MediaRefused says what is wrong."""
    sizes = set()
    for file in files:
        try:
            with Image.open(io.BytesIO(file), formats=IMAGE_FORMATS) as image:
                sizes.add(image.size)
        except (OSError, Image.DecompressionBombError):
            raise MediaRefused("a frame of the video is not an image this server reads") from None
    if len(sizes) > 1:
        raise MediaRefused("the video's frames have different sizes")
    _check_pixels(*sizes.pop(), len(files), limits)


@cache
def bounded(loader: type, limits: VideoLimits) -> type:
    """A loader of vLLM that samples as it does, but within limits, and decodes in a process of its own.

    In the order of method resolution the bound on sampling stands before vLLM's class for a model's processor, the
    decoding behind it: that class chooses the arguments.
    """
    if not issubclass(loader, VideoBackend):
        raise MediaRefused(f"this server does not read videos by vLLM's {loader.__name__}")
    own = () if loader is VideoBackend else (loader,)
    bases = (BoundedSampling, *own, IsolatedDecoding)
    return type(f"Bounded{loader.__name__}", bases, {"limits": limits})


class BoundedSampling:
    """Sampling of frames, of which too many are thinned out evenly."""

    limits: ClassVar[VideoLimits]

    @classmethod
    def compute_frames_index_to_sample(
        cls, source: VideoSourceMetadata, target: VideoTargetMetadata, **kwargs: Any
    ) -> list[int]:
        """Stock sampling; MediaRefused for a video too long or without frames."""
        if source.total_frames_num < 1:
            raise MediaRefused("the video has no frames")
        seconds = source.duration
        if not seconds <= cls.limits.max_seconds:
            raise MediaRefused(f"the video lasts {seconds:.0f} s, over {cls.limits.max_seconds} (--max-video-seconds)")
        most = cls.limits.max_frames
        target = target._replace(num_frames=min(target.num_frames, most) if target.num_frames > 0 else most)
        sample = super().compute_frames_index_to_sample  # type: ignore[misc]
        try:
            indices: list[int] = sample(source=source, target=target, **{"max_frames": most, **kwargs})
        except ZeroDivisionError:  # vLLM's for Qwen2-VL, of a single frame
            indices = []
        if not indices:
            lasts = f"{source.total_frames_num} frames, {seconds:g} s"
            raise MediaRefused(f"the video is too short for this model: {lasts}")
        if len(indices) <= most:
            return indices
        return [indices[place] for place in np.linspace(0, len(indices) - 1, most).round().astype(int)]


class IsolatedDecoding(VideoBackend):
    """Decoding by OpenCV in a process of its own; another codec that the user names decodes in this one, as in vLLM."""

    limits: ClassVar[VideoLimits]

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = -1,
        fps: float = -1,
        max_duration: int = 300,
        frame_recovery: bool = False,
        *,
        backend: str = "opencv",
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """The sampled frames, frames x height x width x 3, and their metadata; MediaRefused says what is wrong."""
        if backend != "opencv" or frame_recovery:
            return super().load_bytes(data, num_frames, fps, max_duration, frame_recovery, backend=backend, **kwargs)
        target = VideoTargetMetadata(num_frames, fps, max_duration)
        sampling, _ = resolve_video_backend_kwargs(backend, kwargs)
        with DecoderProcess(data, cls.limits) as process:
            source = cls._prepare_source(process.source)
            indices = sorted(set(cls.compute_frames_index_to_sample(source=source, target=target, **sampling)))
            _check_pixels(process.width, process.height, len(indices), cls.limits)
            frames, found = process.read(indices)
        if 2 * len(found) < len(indices):
            raise MediaRefused(f"the video is damaged: {len(found)} of {len(indices)} sampled frames can be decoded")
        return frames, cls.create_hf_metadata(
            source=source, valid_frame_indices=found, video_backend=f"{backend}{cls._sampling_suffix}"
        )


class DecoderProcess:
    """A running :mod:`video_process` for one file; ended when left.

    Attributes:
        width: of a frame, in pixels.
        height: of a frame, in pixels.
        source: what vLLM's sampling wants to know.
    """

    def __init__(self, data: bytes, limits: VideoLimits) -> None:
        self.limits = limits
        command = [sys.executable, "-P", video_process.__file__, str(limits.decode_seconds), str(MEMORY_MIB)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in VARIABLES if name in os.environ},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, cast(io.BufferedReader, self.process.stdout)
        try:
            self._send(json.dumps(len(data)).encode() + b"\n" + data)
            described = self._hear()
            self.width, self.height = described["width"], described["height"]
            num_frames, fps = described["num_frames"], described["fps"]
            self.source = VideoSourceMetadata(num_frames, fps, num_frames / fps if fps > 0 else 0)
        except BaseException:
            self.end()
            raise

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """The frames at these ascending indices (frames x height x width x 3, RGB), and the indices that were found."""
        frames = np.empty((len(indices), self.height, self.width, 3), np.uint8)
        found: list[int] = []
        self._send(json.dumps([*indices]).encode() + b"\n")
        while (index := self._hear()) is not None:
            into = memoryview(frames[len(found)]).cast("B")
            if self.output.readinto(into) != len(into):
                raise self._why_ended()
            found.append(index)
        return frames[: len(found)], found

    def end(self) -> None:
        """Kill the process if it still runs, and let nothing of it stay."""
        self.process.kill()
        for pipe in (self.input, self.output):
            with suppress(OSError):
                pipe.close()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.end()

    def _send(self, message: bytes) -> None:
        with suppress(BrokenPipeError):  # its last words, or its exit code, say why
            self.input.write(message)
            self.input.flush()

    def _hear(self) -> Any:
        line = self.output.readline()
        if not line.endswith(b"\n"):
            raise self._why_ended()
        said = json.loads(line)
        if isinstance(said, dict) and "refused" in said:
            raise MediaRefused(said["refused"])
        return said

    def _why_ended(self) -> MediaRefused:
        code = self.process.wait()
        if code in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
            seconds = self.limits.decode_seconds
            return MediaRefused(
                f"decoding the video takes over {seconds} s of CPU time, or {video_process.wall_seconds(seconds)} s "
                "altogether (--max-video-decode-seconds)"
            )
        return MediaRefused(f"the decoder failed on the video, or needed over {MEMORY_MIB} MiB of memory")


def _check_pixels(width: int, height: int, num_frames: int, limits: VideoLimits) -> None:
    if min(width, height) < 1:
        raise MediaRefused("the video's header says no size of its frames")
    if 0 < envs.VLLM_MAX_IMAGE_PIXELS < width * height:
        most = envs.VLLM_MAX_IMAGE_PIXELS
        raise MediaRefused(f"the video's frames have more than {most} pixels (VLLM_MAX_IMAGE_PIXELS)")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise MediaRefused(f"the video is {width} x {height}: one side is over {MAX_ASPECT_RATIO} times the other")
    if num_frames * width * height > limits.max_megapixels * 1_000_000:
        raise MediaRefused(
            f"{num_frames} frames of {width} x {height} are more than {limits.max_megapixels} megapixels "
            "(--max-video-megapixels): send the video smaller"
        )


def _end_of_boxes(data: bytes) -> int:
    """Where the last box of an MP4 or MOV file ends, by its header: past the end if the file is cut off."""
    place = 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4])
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16])
        if size == 0:  # to the end of the file
            return len(data)
        if size < 8:
            raise MediaRefused("the video is damaged: a box of its MP4 is shorter than its header")
        place += size
    return place
