"""Random pictures that no cache has seen."""

import base64
import io


def picture_url(seed: tuple[int, ...], side: int) -> str:
    """A smooth random JPEG of ``side`` x ``side`` pixels as a data URL, as large a file as a photograph of its size."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
