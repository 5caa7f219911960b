"""What every method file provides: a schedule, a signal and a score."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from vllm_hidrop.methods.scoring import Signals
from vllm_hidrop.plan.names import unknown
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.plan.schedule import Schedule
from vllm_hidrop.plan.signal import Signal


@dataclass(frozen=True)
class ModelShape:
    """The two numbers a schedule depends on."""

    num_layers: int
    tokens_per_image: int


def check_shape(shape: tuple[int, int]) -> None:
    """Check the (layers, tokens per image) that a method's numbers are written for.

    Raises:
        ValueError: one of them is not positive.
    """
    if min(shape) < 1:
        raise ValueError(f"shape is (layers, tokens per image), both >= 1, got {shape}")


def depth_ratio(name: str, own: tuple[int, int], shape: ModelShape, may_scale: bool) -> float:
    """By what the layer numbers of a method written for ``own`` (layers, tokens per image) scale to a model.

    Raises:
        ValueError: the model has other layers, and the numbers may not be scaled.
    """
    if shape.num_layers != own[0] and not may_scale:
        raise ValueError(
            f"this {name} schedule is for {own[0]} layers, the model has {shape.num_layers}; "
            'choose the checkpoint\'s own preset, or set "scale": true'
        )
    return shape.num_layers / own[0]


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass whose fields are the paper's hyper-parameters.

    A method is data plus one function, :meth:`score`.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    signal: ClassVar[Signal] = Signal.NONE
    needs_training: ClassVar[bool] = False
    """Whether a model answers badly by it unless it was trained with its schedule on."""
    trained_positions: ClassVar[PositionScheme | None] = None
    """Those that the authors' own checkpoints of this method were trained with, where it is no part of their config."""
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    default_preset: ClassVar[str | None] = None

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The hyper-parameters that a user may set."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_preset(cls, preset: str) -> Self:
        """The method with a preset's values.

        Raises:
            ValueError: no such preset; the message lists the known ones.
        """
        if preset not in cls.presets:
            raise ValueError(unknown(f"method {cls.name!r} has no preset", preset, cls.presets))
        return cls(**cls.presets[preset])

    @classmethod
    def preset_for(cls, shape: ModelShape) -> str | None:
        """The default preset, or the first one that is written for a model of this shape when that one is not."""
        fits = [name for name, values in cls.presets.items() if values.get("shape") == dataclasses.astuple(shape)]
        default = cls.default_preset
        return default if default is None or default in fits or not fits else fits[0]

    def fitted(self, shape: ModelShape) -> Self:
        """The method with its layer numbers scaled to a model of this shape, if they are not written for it.

        Raises:
            ValueError: the hyper-parameters are for another model.
        """
        return self

    def schedule(self, shape: ModelShape) -> Schedule:
        """The stages for a model of this shape.

        Raises:
            ValueError: the hyper-parameters do not fit the model.
        """
        raise NotImplementedError

    def score(self, signals: Signals) -> torch.Tensor:
        """One float32 score per surviving vision token of one image, [V]; higher means keep."""
        raise NotImplementedError
