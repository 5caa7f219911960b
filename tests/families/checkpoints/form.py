"""What the tiny checkpoints share: the facts a test asks for, and the parts of ``verify/tiny_parts.py``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from vllm_hidrop.verify.tiny_parts import (
    FIRST_SPECIAL,
    HEAD_SIZE,
    HIDDEN_SIZE,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    VOCABULARY,
    chat_template,
    save,
    special_ids,
    text_shape,
    word_tokenizer,
)

__all__ = [
    "FIRST_SPECIAL",
    "HEAD_SIZE",
    "HIDDEN_SIZE",
    "NUM_HEADS",
    "NUM_KV_HEADS",
    "NUM_LAYERS",
    "VOCABULARY",
    "Size",
    "TinyCheckpoint",
    "Video",
    "chat_template",
    "placeholder",
    "rewrite_weights",
    "save",
    "special_ids",
    "text_shape",
    "word_tokenizer",
]

HUGGING_FACE = "hugging_face"
"""The folder in a checkpoint that has the same weights in Hugging Face's form, where the two differ."""

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Video:
    """The shape of a test video: ``num_frames`` frames of ``size``, ``fps`` of them a second."""

    num_frames: int
    size: Size
    fps: float = 2.0

    def frames(self, seed: int) -> np.ndarray:
        """Noise, [frames, height, width, 3] of bytes."""
        width, height = self.size
        return np.random.default_rng(seed).integers(0, 256, (self.num_frames, height, width, 3), dtype=np.uint8)

    def metadata(self) -> dict[str, Any]:
        """What vLLM and Hugging Face know of a video whose every frame is used."""
        return {
            "fps": self.fps,
            "total_num_frames": self.num_frames,
            "duration": self.num_frames / self.fps,
            "frames_indices": list(range(self.num_frames)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }


@dataclass(frozen=True)
class TinyCheckpoint:
    """How to make a family's checkpoint and how to ask its model.

    ``make`` writes it into an empty folder. ``image`` and ``video`` are the token ids that stand for one of them in a
    prompt given to vLLM with ``multi_modal_data``; empty where the family takes none. ``image_sizes`` differ in their
    numbers of vision tokens. ``tolerance`` bounds the difference of logits between stock vLLM and Hugging Face; in
    bfloat16 their distance from float32, root mean square in standard deviations of the logits. ``is_remote_code``: the
    configuration's class is in the checkpoint. ``as_hugging_face``: the ids that stand for vision tokens in vLLM's
    expanded prompts, and those that stand for them in Hugging Face's, where they differ; none is embedded.
    """

    make: Callable[[Path], None]
    image: tuple[int, ...]
    image_sizes: tuple[Size, ...]
    video: tuple[int, ...] = ()
    video_shape: Video | None = None
    dtype: str = "float32"
    tolerance: float = 2e-4
    num_layers: int = NUM_LAYERS
    is_remote_code: bool = False
    as_hugging_face: Mapping[int, int] = field(default_factory=dict)

    def reference(self, directory: Path) -> Path:
        """The folder that Hugging Face loads, of a checkpoint in ``directory``."""
        return directory / HUGGING_FACE if self.is_remote_code else directory

    def image_processor(self, directory: Path) -> Any:
        """Hugging Face's; by PIL where the configuration is remote code, as vLLM resizes there."""
        return AutoImageProcessor.from_pretrained(
            self.reference(directory), backend="pil" if self.is_remote_code else None
        )

    def prompt(self, layout: str, seed: int = 0) -> list[int]:
        """Token ids; in ``layout`` an ``i`` is an image, a ``v`` a video, a digit that many random text tokens."""
        rng = np.random.default_rng(seed)
        tokens = [1]
        for part in layout:
            placeholder = {"i": self.image, "v": self.video}.get(part)
            tokens += rng.integers(4, FIRST_SPECIAL, int(part)).tolist() if placeholder is None else placeholder
        return tokens


def placeholder(special: Sequence[str], text: str) -> tuple[int, ...]:
    """The ids of special tokens written with spaces between."""
    ids = special_ids(special)
    return tuple(ids[token] for token in text.split())


def rewrite_weights(directory: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    """Give the saved weights the names and shapes of the hub, which vLLM reads."""
    file = directory / "model.safetensors"
    changed = dict(change(name, value) for name, value in load_file(file).items())
    save_file({name: value.contiguous() for name, value in changed.items()}, file, {"format": "pt"})
