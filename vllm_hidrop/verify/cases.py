"""What is asked: a model, prompts with images, pruning choices; tiny models made on the spot, or the user's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_hidrop.config import HidropConfig, make_method
from vllm_hidrop.methods import Adaptive, ModelShape

if TYPE_CHECKING:
    from vllm_hidrop.models.family import Family

EXPLAIN = {"hidrop_explain": True}
OFF = {"hidrop": "off"}
IMAGE = -1
"""Stands for an image among a question's text."""


@dataclass(frozen=True)
class Question:
    """One request, for a model of any family: see ``prompts.Prompts``.

    ``parts`` are numbers, each of which becomes a token of text, and ``IMAGE``; ``images`` the seeds of noise images.
    """

    parts: tuple[int, ...]
    images: tuple[int, ...]
    max_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def wishing(self, options: Mapping[str, Any]) -> "Question":
        """The same with other options."""
        return replace(self, options=options)


@dataclass(frozen=True)
class Served:
    """One engine of ours: its pruning ``choice``, and the ``methods`` that requests ask of it, its own first.

    ``note`` says what of a method this model cannot run.
    """

    choice: Mapping[str, Any]
    methods: tuple[str, ...]
    note: str = ""

    def options(self, method: str) -> dict[str, Any]:
        """The options of a pruned request under one of the methods."""
        return EXPLAIN if method == self.methods[0] else EXPLAIN | {"hidrop_method": method}


@dataclass(frozen=True)
class Model:
    """A checkpoint to verify; ``architecture`` is vLLM's name of its own."""

    name: str
    path: str
    architecture: str
    shape: ModelShape
    served: tuple[Served, ...]
    layouts: tuple[str, ...]  # of prompts: an i is an image, a digit that many text tokens
    num_generated: int
    max_len: int = 2048  # tokens of a prompt and its answer
    is_tiny: bool = False

    def questions(self) -> list[Question]:
        """The prompts, without options; every image is another one."""
        rng, seeds = np.random.default_rng(3), count()
        asked = []
        for layout in self.layouts:
            parts: list[int] = []
            for part in layout:
                parts += [IMAGE] if part == "i" else rng.integers(1 << 16, size=int(part)).tolist()
            images = tuple(next(seeds) for _ in range(layout.count("i")))
            asked.append(Question(tuple(parts), images, self.num_generated))
        return asked


POOL_BYTES = 4 << 30
"""Of the KV pool, for the user's own model."""

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
TINY_QWEN = (
    Served({"method": "hidrop", "options": _HIDROP | TINY_SHAPE}, ("hidrop",)),
    Served({"method": "pyramiddrop"}, ("pyramiddrop", "fastv")),
)
SCALED = {"options": {"scale": True}, "force": True}
OWN_MODEL = (
    Served({"method": "hidrop", "preset": "tok48", **SCALED}, ("hidrop",)),
    Served({"method": "pyramiddrop", "force": True}, ("pyramiddrop",)),
    Served({"method": "fastv", "force": True}, ("fastv", "random", "uniform")),
    Served({"method": "visipruner", **SCALED}, ("visipruner",)),
    Served({"method": "mustdrop", **SCALED}, ("mustdrop",)),
)  # for weights that never saw pruning: the presets scale to the model


def tiny_models(directory: Path) -> list[Model]:
    """Tiny checkpoints, written into ``directory``: LLaVA with every method, Qwen3-VL for M-RoPE and deepstack."""
    from transformers.utils import logging

    from vllm_hidrop.verify.tiny_models import make_llava
    from vllm_hidrop.verify.tiny_qwen import qwen3_vl

    logging.disable_progress_bar()  # the command has its own
    llava, qwen = make_llava(directory / "llava", "mistral"), directory / "qwen3_vl"
    qwen.mkdir()
    qwen3_vl(qwen)
    return [tiny_model("tiny LLaVA", llava, TINY), tiny_model("tiny Qwen3-VL", qwen, TINY_QWEN)]


def tiny_model(name: str, path: Path, served: tuple[Served, ...]) -> Model:
    """A checkpoint of 8 layers whose images have few tokens."""
    from vllm_hidrop.cli.costing import read_model

    known = read_model(str(path))
    return Model(
        name=name,
        path=str(path),
        architecture=known.hf_config.architectures[0],
        shape=known.shape,
        served=served,
        layouts=TINY_LAYOUTS,
        num_generated=8,
        is_tiny=True,
    )


def own_model(name: str) -> Model:
    """The user's checkpoint. Raises ValueError: it cannot be read, takes no images, or cannot run staged."""
    from vllm_hidrop.cli.costing import read_model

    known = read_model(name)
    assert known.family is not None  # of one that is read
    if not known.family.has_images:
        raise ValueError(f"{known.family.title} takes videos alone, and verify asks with images")
    longest = known.family.text_config(known.hf_config).max_position_embeddings
    that_fit = POOL_BYTES // (2 * known.text.num_layers * known.text.kv_bytes_per_row)  # two of the longest prompts
    entry = {key: value for key, value in (known.trained or {}).items() if key in HidropConfig.model_fields}
    trained = (Served(entry, (entry["method"],)),) if "method" in entry else ()
    names = {served.methods[0] for served in trained}
    others = (served for served in OWN_MODEL if served.methods[0] not in names)
    return Model(
        name=name,
        path=str(_path_of(name)),
        architecture=known.hf_config.architectures[0],
        shape=known.shape,
        served=(*trained, *(_without_tower_part(served, known.family, known.hf_config) for served in others)),
        layouts=MODEL_LAYOUTS,
        num_generated=4,
        max_len=min(8192, longest, that_fit),
    )


def _without_tower_part(served: Served, family: "Family", config: Any) -> Served:
    """The same where the tower can do what the method asks of it, else without that."""
    method = make_method(served.choice["method"], served.choice.get("preset"), served.choice.get("options"))
    if not isinstance(method, Adaptive) or method.reduction is None or family.no_reduction(config) is None:
        return served
    options = {**served.choice["options"], **method.without_reduction}
    return replace(served, choice={**served.choice, "options": options}, note="without its part in the tower")


def _path_of(name: str) -> Path | str:
    if name != "embedded":
        return name
    from vllm_hidrop.embedded import MODEL_DIR

    return MODEL_DIR
