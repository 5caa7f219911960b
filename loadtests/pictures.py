"""Random pictures and videos that no cache has seen."""

import base64
import io
import tempfile
from pathlib import Path

FRAMES_PER_SECOND = 4


def picture_url(seed: tuple[int, ...], side: int) -> str:
    """A smooth random JPEG of ``side`` x ``side`` pixels as a data URL, as large a file as a photograph of its size."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def video_url(seed: tuple[int, ...], side: int, num_frames: int) -> str:
    """A random MP4 as a data URL: a square of noise crosses a smooth ground of ``side`` x ``side`` pixels."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    ground = cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    square = rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    top = int(rng.integers(0, side - len(square) + 1))
    with tempfile.TemporaryDirectory() as folder:  # OpenCV writes videos to files only
        path = Path(folder) / "video.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FRAMES_PER_SECOND, (side, side))
        for index in range(num_frames):
            frame = ground.copy()
            left = index * (side - len(square)) // max(1, num_frames - 1)
            frame[top : top + len(square), left : left + len(square)] = square
            writer.write(frame)
        writer.release()
        return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
