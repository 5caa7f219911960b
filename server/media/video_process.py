"""The program that decodes one video, in a process of its own with limits of time and memory.

FFmpeg's decoders are C code on strangers' bytes: a fault ends this process, not the server, and the kernel denies it
more memory than it may have. It opens no network connection, no second file and writes none.

Its arguments are the CPU time in seconds and the memory in MiB that it may take. Over standard input and output:

1. in: a line of JSON, the number of bytes, and the file;
2. out: a line of JSON, the stream's ``width``, ``height``, ``num_frames``, ``fps``;
3. in: a line of JSON, the ascending indices of the frames to send;
4. out: for each frame that can be decoded a line of JSON, its index, and height x width x 3 bytes, RGB; then ``null``.

In place of 2 and 4 comes ``{"refused": reason}`` where the file is at fault. Imports only OpenCV, to start fast.
"""

import io
import json
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

PATIENCE = 4  # seconds of wall time for each second of CPU time: the machine may have other work
NICENESS = 10
MAX_THREADS = 4  # each holds frames of its own
CODECS = {
    "h264": "H.264",
    "hevc": "HEVC",
    "vp80": "VP8",
    "vp90": "VP9",
    "fmp4": "MPEG-4",
    "mjpg": "Motion JPEG",
}
FFMPEG_OPTIONS = {
    "format_whitelist": "mov,matroska,avi",  # others, playlists among them, read further files and addresses
    "protocol_whitelist": "none",
    "codec_whitelist": "h264,hevc,vp8,vp9,mpeg4,mjpeg,aac,mp3,opus,vorbis",  # sound is never decoded
}


class Refused(Exception):
    """The file is at fault; the message says what is wrong."""


def main(cpu_seconds: int, memory_mib: int) -> None:
    """Answer one file, see the module."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    import_decoder()
    limit_resources(cpu_seconds, memory_mib)
    data = source.read(json.loads(source.readline()))
    try:
        capture = open_stream(data)
        described = describe(capture, data)
        _say(sink, described)
        asked = source.readline()
        if asked:
            again = open_stream(data)  # a stream of one frame does not rewind
            send_frames(sink, again, json.loads(asked), (described["height"], described["width"], 3))
            _say(sink, None)
    except Refused as error:
        _say(sink, {"refused": str(error)})


def import_decoder() -> None:
    """Import OpenCV, with our options for its FFmpeg."""
    options = "|".join(f"{name};{value}" for name, value in FFMPEG_OPTIONS.items())
    os.environ |= {"OPENCV_FFMPEG_CAPTURE_OPTIONS": options, "OPENCV_LOG_LEVEL": "SILENT", "OPENBLAS_NUM_THREADS": "1"}
    import cv2  # noqa: F401


def limit_resources(cpu_seconds: int, memory_mib: int) -> None:
    """Have the kernel end this process after its time, and deny it more memory and any file."""
    signal.setitimer(signal.ITIMER_REAL, wall_seconds(cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[5]) * resource.getpagesize()
    limit = held + (memory_mib << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)


def wall_seconds(cpu_seconds: int) -> int:
    """Wall time, in seconds, after which the process is ended."""
    return PATIENCE * cpu_seconds + 1


def open_stream(data: bytes, *, packets: bool = False) -> Any:
    """OpenCV's reader of the first video stream; with ``packets`` it grabs encoded packets and decodes nothing."""
    import cv2

    parameters = [cv2.CAP_PROP_N_THREADS, min(MAX_THREADS, os.cpu_count() or 1)]
    if packets:
        parameters += [cv2.CAP_PROP_FORMAT, -1]
    stream: Any = io.BytesIO(data)  # OpenCV's stubs know its own kind of stream only
    capture = cv2.VideoCapture(stream, cv2.CAP_FFMPEG, parameters)
    if not capture.isOpened():
        raise Refused("no video stream can be read from the file")
    return capture


def describe(capture: Any, data: bytes) -> dict[str, Any]:
    """Size, number of frames and frames a second; a header's number of frames is not believed beyond what is there."""
    import cv2

    codec = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True).decode("latin-1").lower()
    if codec not in CODECS:
        raise Refused(f"the video's codec is not one this server reads: {', '.join(CODECS.values())}")
    return {
        "width": int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
        "height": int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
        "num_frames": _count_frames(capture, data),
        "fps": capture.get(cv2.CAP_PROP_FPS),
    }


def send_frames(sink: BinaryIO, capture: Any, indices: list[int], shape: tuple[int, int, int]) -> None:
    """Decode up to the last index and send the frames at ``indices``; what cannot be decoded is left out."""
    import cv2

    wanted = frozenset(indices)
    for index in range(max(indices) + 1):
        if not capture.grab() or index not in wanted:
            continue
        is_there, frame = capture.retrieve()
        if not is_there:
            continue
        if frame.shape != shape:
            raise Refused("the video's frames change their size")
        _say(sink, index)
        sink.write(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).data)


def _count_frames(capture: Any, data: bytes) -> int:
    """The number of frames, as vLLM counts them but at most as many as there are packets.

    A header may know no number (a stream), or one that an edit list cuts short; vLLM finds the latter by a seek to the
    end (``OpenCVVideoBackendMixin.get_video_metadata``).
    """
    import cv2

    claimed = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if claimed > 0 and capture.set(cv2.CAP_PROP_POS_AVI_RATIO, 1.0):
        visible = int(capture.get(cv2.CAP_PROP_POS_FRAMES))
        is_at_end = not capture.grab()
        capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
        if is_at_end and 0 < visible < claimed - 1:
            claimed = visible
    packets = _count_packets(data)
    return min(claimed, packets) if claimed > 0 else packets


def _count_packets(data: bytes) -> int:
    capture = open_stream(data, packets=True)
    count = 0
    while capture.grab():
        count += 1
    return count


def _say(sink: BinaryIO, value: Any) -> None:
    sink.write(json.dumps(value).encode() + b"\n")
    sink.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
