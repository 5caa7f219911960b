"""The rows of the accuracy document: a checkpoint, what it is served with, and the row it is compared with."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from vllm_hidrop.config import HidropConfig, Resolved, resolve
from vllm_hidrop.embedded import CHECKPOINTS
from vllm_hidrop.lab.evaluate.exam import Arm
from vllm_hidrop.lab.train.schedules import EARLY_KEEP, EARLY_LAYER, FORMS, HIDROP, SHAPE, method_entry
from vllm_hidrop.methods import Adaptive, Method
from vllm_hidrop.methods.controls import Random, Uniform
from vllm_hidrop.methods.fastv import FastV
from vllm_hidrop.methods.pyramiddrop import PyramidDrop
from vllm_hidrop.plan.schedule import Schedule

FLAGS = ("--enforce-eager", "--max-model-len", "1024")
"""Flags of every server: no compilation, and no more context than the questions need."""
FLOAT32 = ("--dtype", "float32")
EARLY = (EARLY_LAYER, EARLY_KEEP)
LATE = (HIDROP.filter_layers[-1], HIDROP.keeps[-1])
WIDE = (HIDROP.filter_layers[-1], 57)
"""First layer and keep of one cut: HiDrop's mean tokens; a cut where the model reads; VisiPruner's tokens."""
WIDE_PYRAMID = (200, 100, 44)
"""Like ``WIDE`` a mean of 230 tokens: what VisiPruner kept of the scenes that its preset was tried on."""


class Group(StrEnum):
    """The table a row belongs to."""

    SHIPPED = "shipped"
    FLOAT32 = "float32"
    EQUAL = "equal_tokens"
    LATE = "late_cut"
    WIDE = "visipruner_tokens"
    ABLATION = "ablation"


@dataclass(frozen=True)
class Row:
    """One line of a table; ``label`` is unique in its group.

    Attributes:
        shown: the checkpoint's directory as the document names it.
        reference: name of the row it is compared with, asked the same questions.
        choice: ``--hidrop-config``; None for the checkpoint's own schedule.
        flags: further flags of ``hidrop serve``.
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
        """The row's key, unique among all rows."""
        return f"{self.group}/{self.label}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows the checkpoint in ``hidrop serve``."""
        choice = () if self.choice is None else ("--hidrop-config", json.dumps(self.choice))
        return (*choice, *self.flags, *FLAGS)

    def arm(self, directory: Path | None = None) -> Arm:
        """How the row is served and asked."""
        return Arm(self.name, (str(self.checkpoint), *self.arguments), self.xargs, directory)

    def resolved(self) -> Resolved:
        """The schedule the row is served with; ValueError where the ``hidrop`` entry or the choice cannot be served."""
        return resolve(HidropConfig.parse(self.choice or {}), SHAPE, trained_entry_of(self.checkpoint))

    def key(self) -> str:
        """A hash of all that decides the answers but the questions: weights, configuration, arguments."""
        parts = hashlib.sha256()
        for file in ("model.safetensors", "config.json"):
            parts.update((self.checkpoint / file).read_bytes())
        parts.update(json.dumps([self.arguments, dict(self.xargs)]).encode())
        return parts.hexdigest()[:12]


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
    """The two checkpoints as they are, and the HiDrop one told to keep every token."""
    texts = {
        "dense": "the dense checkpoint",
        "hidrop": "the HiDrop checkpoint with the schedule it was trained with",
    }
    dense, hidrop = (
        Row(Group.SHIPPED, name, CHECKPOINTS[name], f"vllm_hidrop/embedded/{name}", "shipped/dense", text)
        for name, text in texts.items()
    )
    told = "the HiDrop checkpoint told to prune nothing"
    return [dense, hidrop, replace(hidrop, label="hidrop_off", xargs={"hidrop": "off"}, meaning=told)]


def float32_rows() -> list[Row]:
    """The two checkpoints in the training code's precision."""
    return [
        replace(row, group=Group.FLOAT32, flags=FLOAT32, reference="float32/dense", meaning=f"{row.meaning}, float32")
        for row in shipped_rows()[:2]
    ]


def training_free_rows() -> list[Row]:
    """Schedules that the dense checkpoint was not trained with; an adaptive method keeps what its server reports."""
    before, any_tokens, even = (
        "FastV: scored by the attention of the layer before",
        "any tokens",
        "evenly spaced tokens",
    )
    under = "the same cut, scored by attention under the layer about to run"
    alike = "MustDrop: alike patches merged, key patches kept, the rest by all text rows"
    published = "VisiPruner with the published thresholds; cut and exit where they say"
    told = "VisiPruner told to cut after layer 5, to 32 tokens (a deviation)"
    table: list[tuple[Group, str, Method | dict[str, Any], str]] = [
        (Group.EQUAL, "hidrop", FORMS["hidrop"].method, "HiDrop's schedule, forced"),
        (Group.EQUAL, "fastv", FastV(*EARLY), "FastV: one cut, scored by the attention of layer 0"),
        (Group.EQUAL, "early_cut", FORMS["early_cut"].method, under),
        (Group.EQUAL, "pyramiddrop", FORMS["pyramiddrop"].method, "PyramidDrop: three cuts"),
        (Group.EQUAL, "random", Random(*EARLY), f"FastV's schedule, {any_tokens}"),
        (Group.EQUAL, "uniform", Uniform(*EARLY), f"FastV's schedule, {even}"),
        (Group.LATE, "fastv", FastV(*LATE), before),
        (Group.LATE, "random", Random(*LATE), any_tokens),
        (Group.LATE, "uniform", Uniform(*LATE), even),
        (Group.WIDE, "fastv", FastV(*WIDE), before),
        (Group.WIDE, "pyramiddrop", PyramidDrop(keeps=WIDE_PYRAMID), "PyramidDrop: three cuts, at layers 3, 6 and 9"),
        (Group.WIDE, "random", Random(*WIDE), any_tokens),
        (Group.WIDE, "uniform", Uniform(*WIDE), even),
        (Group.EQUAL, "mustdrop", {"method": "mustdrop", "preset": "embedded"}, alike),
        (Group.WIDE, "visipruner", {"method": "visipruner", "preset": "embedded"}, published),
        (Group.WIDE, "visipruner_topk", {"method": "visipruner", "preset": "embedded-topk"}, told),
    ]
    dense = shipped_rows()[0]
    return [
        replace(
            dense,
            group=group,
            label=label,
            choice=choice if isinstance(choice, dict) else method_entry(choice),
            meaning=meaning,
        )
        for group, label, choice, meaning in table
    ]


def ablation_rows(directory: Path) -> list[Row]:
    """Every checkpoint in a directory under its own schedule, in the order of ``FORMS``, unknown ones last."""
    found = sorted(path.parent.name for path in directory.glob("*/config.json"))
    names = [name for name in FORMS if name in found] + [name for name in found if name not in FORMS]
    texts = {name: form.summary for name, form in FORMS.items()}
    other = "a checkpoint found in the directory"
    return [
        Row(Group.ABLATION, name, directory / name, f"ABLATIONS/{name}", "ablation/dense", texts.get(name, other))
        for name in names
    ]


def all_rows(ablations: Path | None) -> list[Row]:
    """Every row, those that share a server next to each other."""
    own = ablation_rows(ablations) if ablations else []
    return [*shipped_rows(), *float32_rows(), *training_free_rows(), *own]


def choose(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """Rows of the groups or names in ``only`` (empty: all); ValueError: no such row, or a reference is left out."""
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
    """A row in the figures' file, without paths of this machine."""
    resolved = row.resolved()
    stages = "as decided for each request" if isinstance(resolved.method, Adaptive) else stages_text(resolved.schedule)
    if row.xargs.get("hidrop") == "off":
        stages = "every vision token in every layer"
    plain = {key: value for key, value in asdict(row).items() if key != "checkpoint"}
    own = trained_entry_of(row.checkpoint) or {}
    return {"name": row.name, **plain, "trained": own, "stages": stages, "key": row.key()}
