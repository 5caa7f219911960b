"""What is asked: every row is a checkpoint, what it is served with, and the row it is compared with.

Knows no server and no figures.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from vllm_hidrop.config import HidropConfig, Resolved, resolve
from vllm_hidrop.embedded import CHECKPOINTS
from vllm_hidrop.lab.evaluate.arms import Arm
from vllm_hidrop.lab.train.schedules import EARLY_KEEP, EARLY_LAYER, FORMS, HIDROP, SHAPE, method_entry
from vllm_hidrop.methods import Adaptive, Method
from vllm_hidrop.methods.controls import Random, Uniform
from vllm_hidrop.methods.fastv import FastV
from vllm_hidrop.methods.pyramiddrop import PyramidDrop
from vllm_hidrop.plan.schedule import Schedule

FLAGS = ("--enforce-eager", "--max-model-len", "1024")
"""Of every server: no compilation, and no more context than the questions need."""
FLOAT32 = ("--dtype", "float32")
LATE_LAYER, LATE_KEEP = HIDROP.filter_layers[-1], HIDROP.keeps[-1]
WIDE_LAYER, WIDE_KEEP = LATE_LAYER, 57
WIDE_PYRAMID = (200, 100, 44)
"""With these, 230 tokens in the mean: what VisiPruner kept of the scenes that its preset was tried on."""


class Group(StrEnum):
    """Which table a row belongs to."""

    SHIPPED = "shipped"
    FLOAT32 = "float32"
    EQUAL = "equal_tokens"
    LATE = "late_cut"
    WIDE = "visipruner_tokens"
    ABLATION = "ablation"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        group: its table.
        label: its name there, unique in its group.
        checkpoint: directory.
        shown: the directory as the document names it.
        reference: name of the row it is compared with, asked the same questions.
        meaning: one line.
        choice: ``--hidrop-config``; None for the checkpoint's own schedule.
        flags: more of ``hidrop serve``'s flags.
        xargs: ``vllm_xargs`` of every request.
    """

    group: Group
    label: str
    checkpoint: Path
    shown: str
    reference: str
    meaning: str
    choice: Mapping[str, Any] | None = None
    flags: tuple[str, ...] = ()
    xargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique among all rows."""
        return f"{self.group}/{self.label}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows the checkpoint in ``hidrop serve``."""
        choice = () if self.choice is None else ("--hidrop-config", json.dumps(self.choice))
        return (*choice, *self.flags, *FLAGS)

    @property
    def arm(self) -> Arm:
        """How it is served and asked."""
        return Arm(self.name, (str(self.checkpoint), *self.arguments), self.xargs)

    def resolved(self) -> Resolved:
        """The schedule it is served with.

        Raises:
            ValueError: the checkpoint's ``hidrop`` entry or the choice cannot be served.
        """
        return resolve(HidropConfig.parse(self.choice or {}), SHAPE, trained_entry_of(self.checkpoint))

    def key(self) -> str:
        """A hash of all that decides the answers but the questions: weights, configuration, arguments."""
        parts = hashlib.sha256()
        for file in ("model.safetensors", "config.json"):
            parts.update((self.checkpoint / file).read_bytes())
        parts.update(json.dumps([self.arguments, dict(self.xargs)]).encode())
        return parts.hexdigest()[:12]


ADAPTIVE_ROWS: tuple[dict[str, Any], ...] = (
    {
        "group": Group.EQUAL,
        "label": "mustdrop",
        "meaning": "MustDrop: alike patches merged, key patches kept, the rest by all text rows",
        "choice": {"method": "mustdrop", "preset": "embedded"},
    },
    {
        "group": Group.WIDE,
        "label": "visipruner",
        "meaning": "VisiPruner with the published thresholds; cut and exit where they say",
        "choice": {"method": "visipruner", "preset": "embedded"},
    },
    {
        "group": Group.WIDE,
        "label": "visipruner_topk",
        "meaning": "VisiPruner told to cut after layer 5, to 32 tokens (a deviation)",
        "choice": {"method": "visipruner", "preset": "embedded-topk"},
    },
)
"""Rows whose counts the method decides; their means are what the server reported."""


def trained_entry_of(checkpoint: Path) -> dict[str, Any] | None:
    """The ``hidrop`` entry of a checkpoint's ``config.json``."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return config.get("hidrop")


def stages_text(schedule: Schedule) -> str:
    """Vision tokens per stage in words: ``0 in layers 0-1, 576 in layer 2``."""
    parts = []
    for kept, stage, end in zip(
        schedule.kept(SHAPE.tokens_per_image), schedule.stages, schedule.end_layers, strict=True
    ):
        first, last = stage.first_layer, end - 1
        parts.append(f"{kept} in " + (f"layer {first}" if first == last else f"layers {first}-{last}"))
    return ", ".join(parts)


def shipped_rows() -> list[Row]:
    """The two checkpoints as they are, and HiDrop's told to keep every token."""
    dense = Row(
        Group.SHIPPED,
        "dense",
        CHECKPOINTS["dense"],
        "vllm_hidrop/embedded/dense",
        "shipped/dense",
        "the dense checkpoint",
    )
    hidrop = replace(
        dense,
        label="hidrop",
        checkpoint=CHECKPOINTS["hidrop"],
        shown="vllm_hidrop/embedded/hidrop",
        meaning="the HiDrop checkpoint with the schedule it was trained with",
    )
    off = replace(
        hidrop, label="hidrop_off", xargs={"hidrop": "off"}, meaning="the HiDrop checkpoint told to prune nothing"
    )
    return [dense, hidrop, off]


def float32_rows() -> list[Row]:
    """The two checkpoints in the training code's precision."""
    return [
        replace(row, group=Group.FLOAT32, flags=FLOAT32, reference="float32/dense", meaning=f"{row.meaning}, float32")
        for row in shipped_rows()[:2]
    ]


def training_free_rows() -> list[Row]:
    """Schedules the dense checkpoint never saw: HiDrop's mean number of tokens, then one cut where the model reads."""
    forms = {name: FORMS[name].method for name in ("hidrop", "pyramiddrop", "early_cut")}
    equal: dict[str, tuple[Method, str]] = {
        "hidrop": (forms["hidrop"], "HiDrop's schedule, forced"),
        "fastv": (FastV(layer=EARLY_LAYER, keep=EARLY_KEEP), "FastV: one cut, scored by the attention of layer 0"),
        "early_cut": (forms["early_cut"], "the same cut, scored by attention under the layer about to run"),
        "pyramiddrop": (forms["pyramiddrop"], "PyramidDrop: three cuts"),
        "random": (Random(layer=EARLY_LAYER, keep=EARLY_KEEP), "FastV's schedule, any tokens"),
        "uniform": (Uniform(layer=EARLY_LAYER, keep=EARLY_KEEP), "FastV's schedule, evenly spaced tokens"),
    }
    late: dict[str, tuple[Method, str]] = {
        "fastv": (FastV(layer=LATE_LAYER, keep=LATE_KEEP), "FastV: scored by the attention of the layer before"),
        "random": (Random(layer=LATE_LAYER, keep=LATE_KEEP), "any tokens"),
        "uniform": (Uniform(layer=LATE_LAYER, keep=LATE_KEEP), "evenly spaced tokens"),
    }
    dense = shipped_rows()[0]
    rows = [
        replace(dense, group=group, label=label, meaning=meaning, choice=method_entry(method))
        for group, methods in ((Group.EQUAL, equal), (Group.LATE, late), (Group.WIDE, _wide()))
        for label, (method, meaning) in methods.items()
    ]
    return [*rows, *(replace(dense, **given) for given in ADAPTIVE_ROWS)]


def _wide() -> dict[str, tuple[Method, str]]:
    """The others at about as many tokens as VisiPruner keeps, which holds all until it has found its layer."""
    return {
        "fastv": (FastV(layer=WIDE_LAYER, keep=WIDE_KEEP), "FastV: scored by the attention of the layer before"),
        "pyramiddrop": (PyramidDrop(keeps=WIDE_PYRAMID), "PyramidDrop: three cuts, at layers 3, 6 and 9"),
        "random": (Random(layer=WIDE_LAYER, keep=WIDE_KEEP), "any tokens"),
        "uniform": (Uniform(layer=WIDE_LAYER, keep=WIDE_KEEP), "evenly spaced tokens"),
    }


def ablation_rows(directory: Path) -> list[Row]:
    """Every checkpoint in a directory under its own schedule, in the order of ``FORMS``, unknown ones last."""
    found = sorted(path.parent.name for path in directory.glob("*/config.json"))
    names = [name for name in FORMS if name in found] + [name for name in found if name not in FORMS]
    return [
        Row(
            Group.ABLATION,
            name,
            directory / name,
            f"ABLATIONS/{name}",
            "ablation/dense",
            FORMS[name].summary if name in FORMS else "a checkpoint found in the directory",
        )
        for name in names
    ]


def all_rows(ablations: Path | None) -> list[Row]:
    """Every row, those that share a server next to each other."""
    return [
        *shipped_rows(),
        *float32_rows(),
        *training_free_rows(),
        *(ablation_rows(ablations) if ablations else []),
    ]


def choose(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """Rows of the groups or names in ``only``; all when it is empty.

    Raises:
        ValueError: a word names no row; a row's reference was not chosen.
    """
    for word in only:
        if not any(word in (row.group, row.name) for row in rows):
            raise ValueError(f"no row {word!r}; known: {', '.join(row.name for row in rows)}")
    chosen = [row for row in rows if not only or row.group in only or row.name in only]
    names = {row.name for row in chosen}
    for row in chosen:
        if row.reference not in names:
            raise ValueError(f"{row.name} is compared with {row.reference}, which is not among the rows")
    return chosen


def described(row: Row) -> dict[str, Any]:
    """What the figures' file says of a row; no path of this machine."""
    resolved = row.resolved()
    stages = "as decided for each request" if isinstance(resolved.method, Adaptive) else stages_text(resolved.schedule)
    if row.xargs.get("hidrop") == "off":
        stages = "every vision token in every layer"
    plain = {key: value for key, value in asdict(row).items() if key != "checkpoint"}
    own = trained_entry_of(row.checkpoint) or {}
    return {"name": row.name, **plain, "trained": own, "stages": stages, "key": row.key()}
