"""Video files as strangers send them: valid ones of every kind, and ones that must be refused."""

import base64
import struct
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from tests.server.media.files import saved

RECORDINGS = Path(__file__).with_name("recordings")
"""Made with FFmpeg, for what OpenCV does not write: H.264 with sound, turned, trimmed; WebM to a pipe."""


def recording(name: str) -> bytes:
    """A file of :data:`RECORDINGS`."""
    return (RECORDINGS / name).read_bytes()


def clip(
    suffix: str = "mp4", codec: str = "mp4v", num_frames: int = 20, size: tuple[int, int] = (64, 48), fps: float = 10
) -> bytes:
    """A bright square that moves to the right; ``size`` is width and height."""
    width, height = size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{suffix}"
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, size)
        assert writer.isOpened()
        for index in range(num_frames):
            frame = np.zeros((height, width, 3), np.uint8)
            left = index * width // (2 * num_frames)
            frame[height // 4 : height // 2, left : left + width // 4] = (40, 90, 250)
            writer.write(frame)
        writer.release()
        return path.read_bytes()


def frame_list(num_frames: int, size: tuple[int, int] = (32, 32), image_format: str = "JPEG") -> str:
    """What stands behind the comma of a ``data:video/jpeg;base64,`` URL."""
    files = [saved(Image.new("RGB", size, (index * 7 % 256, 0, 0)), image_format) for index in range(num_frames)]
    return ",".join(base64.b64encode(file).decode() for file in files)


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/hostname\n"
EMPTY_MP4 = struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 512, b"isom")
