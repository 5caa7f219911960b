"""What is asked: a model, prompts with images, pruning choices; tiny models made on the spot, or the user's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vllm_hidrop.config import HidropConfig
from vllm_hidrop.methods import METHODS, ModelShape

EXPLAIN = {"hidrop_explain": True}
OFF = {"hidrop": "off"}


@dataclass(frozen=True)
class Question:
    """One request: tokens with one image token per image, its noise images' seeds, width and height, options."""

    tokens: tuple[int, ...]
    images: tuple[int, ...]
    size: tuple[int, int]
    max_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def wishing(self, options: Mapping[str, Any]) -> "Question":
        """The same with other options."""
        return replace(self, options=options)


@dataclass(frozen=True)
class Served:
    """One engine of ours: its pruning ``choice``, and the ``methods`` that requests ask of it, its own first."""

    choice: Mapping[str, Any]
    methods: tuple[str, ...]

    def options(self, method: str) -> dict[str, Any]:
        """The options of a pruned request under one of the methods."""
        return EXPLAIN if method == self.methods[0] else EXPLAIN | {"hidrop_method": method}


@dataclass(frozen=True)
class Model:
    """A checkpoint to verify."""

    name: str
    path: str
    shape: ModelShape
    image_token: int
    image_size: tuple[int, int]
    text_tokens: tuple[int, int]  # first and behind the last of those that prompts draw from
    served: tuple[Served, ...]
    layouts: tuple[str, ...]  # of prompts: an i is an image, a digit that many text tokens
    num_generated: int
    max_len: int = 2048  # tokens of a prompt and its answer
    is_tiny: bool = False

    def questions(self) -> list[Question]:
        """The prompts, without options; every image is another one."""
        rng = np.random.default_rng(3)
        first, end = self.text_tokens
        asked = []
        for number, layout in enumerate(self.layouts):
            tokens = [1]
            for part in layout:
                tokens += [self.image_token] if part == "i" else rng.integers(first, end, int(part)).tolist()
            seeds = tuple(range(10 * number, 10 * number + layout.count("i")))
            asked.append(Question(tuple(tokens), seeds, self.image_size, self.num_generated))
        return asked

    def expanded(self, question: Question) -> list[int]:
        """A question's tokens with the image token once per vision token."""
        sizes = {self.image_token: self.shape.tokens_per_image}
        return [token for token in question.tokens for _ in range(sizes.get(token, 1))]


TINY_LAYOUTS = ("3i5", "i7", "2ii3i4", "9", "5i2i6")
MODEL_LAYOUTS = ("9i9", "5i2i6")
TINY_SHAPE = {"shape": [8, 64]}
_HIDROP = {"inject_layer": 3, "filter_layers": [4, 6], "keeps": [20, 5], "exit_layer": 8}
_VISIPRUNER = {"shallow_layers": 2, "cosine": 0.96, "norm": 0.3, "exit_cosine": 0.98}
_MUSTDROP = {
    "global_threshold": 0.014,
    "individual_threshold": 0.03,
    "filter_layers": [1, 3, 5],
    "merge_threshold": 0.2,
    "merge_window": 2,
}
TINY = (
    Served({"method": "hidrop", "options": _HIDROP | TINY_SHAPE}, ("hidrop",)),
    Served({"method": "pyramiddrop"}, ("pyramiddrop", "fastv", "random", "uniform")),
    Served({"method": "visipruner", "options": _VISIPRUNER | TINY_SHAPE}, ("visipruner",)),
    Served({"method": "mustdrop", "options": _MUSTDROP | TINY_SHAPE}, ("mustdrop",)),
)
SCALED = {"options": {"scale": True}, "force": True}
OWN_MODEL = (
    Served({"method": "hidrop", "preset": "tok48", **SCALED}, ("hidrop",)),
    Served({"method": "pyramiddrop", "force": True}, ("pyramiddrop",)),
    Served({"method": "fastv", "force": True}, ("fastv", "random", "uniform")),
    Served({"method": "visipruner", **SCALED}, ("visipruner",)),
    Served({"method": "mustdrop", **SCALED}, ("mustdrop",)),
)  # for weights that never saw pruning: the presets scale to the model


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A noise image of ``size`` (width, height); of a tower's own size no resampling blurs a comparison."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def tiny_model(directory: Path) -> Model:
    """A tiny checkpoint, written into ``directory``."""
    from vllm_hidrop.verify.tiny_models import IMAGE_SIZE, IMAGE_TOKEN, NUM_LAYERS, TOKENS_PER_IMAGE, make_llava

    assert {name for served in TINY for name in served.methods} == set(METHODS) - {"none"}, "every method is verified"
    return Model(
        name="tiny",
        path=str(make_llava(directory, "mistral")),
        shape=ModelShape(NUM_LAYERS, TOKENS_PER_IMAGE),
        image_token=IMAGE_TOKEN,
        image_size=(IMAGE_SIZE, IMAGE_SIZE),
        text_tokens=(4, 120),
        served=TINY,
        layouts=TINY_LAYOUTS,
        num_generated=8,
        is_tiny=True,
    )


def own_model(name: str) -> Model:
    """The user's checkpoint. Raises ValueError: it cannot be read, or is of no family that runs staged."""
    from vllm_hidrop.cli.costing import read_model

    known = read_model(name)
    config = known.hf_config
    entry = {key: value for key, value in (known.trained or {}).items() if key in HidropConfig.model_fields}
    trained = (Served(entry, (entry["method"],)),) if "method" in entry else ()
    names = {served.methods[0] for served in trained}
    side = config.vision_config.image_size
    return Model(
        name=name,
        path=str(_path_of(name)),
        shape=known.shape,
        image_token=config.image_token_index,
        image_size=(side, side),
        text_tokens=(1000, 10_000) if config.text_config.vocab_size > 10_000 else (4, 100),
        served=(*trained, *(served for served in OWN_MODEL if served.methods[0] not in names)),
        layouts=MODEL_LAYOUTS,
        num_generated=4,
        max_len=min(2048, config.text_config.max_position_embeddings),
    )


def _path_of(name: str) -> Path | str:
    if name != "embedded":
        return name
    from vllm_hidrop.embedded import MODEL_DIR

    return MODEL_DIR
