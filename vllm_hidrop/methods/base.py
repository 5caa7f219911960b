"""The base class of all methods: a schedule, a signal and a scorer."""

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

PUBLISHED_FAMILY = "LLaVA-1.5"
"""The one family that papers publish numbers for."""
PUBLISHED_SIZE = (32, 576)
"""Layers and tokens per image of its 7B model."""

SCALED = "scaled, not tuned"
"""Said of a paper's numbers that were carried over to another family."""


@dataclass(frozen=True)
class ModelShape:
    """What a schedule depends on of a model.

    ``tokens_per_image`` are those of every image, or of a typical one where ``is_dynamic``: images of another size or
    form have another number of tokens there, and counts become shares. ``family`` is the family's title.
    ``attention_layers`` are the layers with attention, ascending; None: all. The others are recurrent, and no cut can
    be scored under them.
    """

    num_layers: int
    tokens_per_image: int
    is_dynamic: bool = False
    family: str = PUBLISHED_FAMILY
    attention_layers: tuple[int, ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Number of layers and tokens per image, for which a method is written."""
        return self.num_layers, self.tokens_per_image


def check_shape(shape: tuple[int, int]) -> None:
    """Raise ValueError unless both of (layers, tokens per image), for which a method is written, are positive."""
    if min(shape) < 1:
        raise ValueError(f"shape is (layers, tokens per image), both >= 1, got {shape}")


def depth_ratio(name: str, own: tuple[int, int], shape: ModelShape, may_scale: bool) -> float:
    """The factor that scales layer numbers of a method written for ``own`` (layers, tokens per image) to a model.

    ValueError where the model has another number of layers and ``may_scale`` is False.
    """
    if shape.num_layers != own[0] and not may_scale:
        raise ValueError(
            f"this {name} schedule is for {own[0]} layers, the model has {shape.num_layers}; "
            'choose the checkpoint\'s own preset, or set "scale": true'
        )
    return shape.num_layers / own[0]


@dataclass(frozen=True)
class Method:
    """Base of all methods: data plus one function, :meth:`score`. Fields are the paper's hyper-parameters."""

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    signal: ClassVar[Signal] = Signal.NONE
    needs_training: ClassVar[bool] = False
    """Whether a model answers badly by it unless it was trained with its schedule on."""
    trained_positions: ClassVar[PositionScheme | None] = None
    """Position scheme that the authors' own checkpoints were trained with, where their configuration does not say."""
    layer_options: ClassVar[tuple[str, ...]] = ()
    """The options that name layers."""
    tuned_options: ClassVar[tuple[str, ...]] = ()
    """The options whose values its paper found on LLaVA-1.5."""
    elsewhere: ClassVar[str | None] = None
    """What its numbers are for other families, in a few words; None where there are none to be tuned."""
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    default_preset: ClassVar[str | None] = None

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The hyper-parameters that a user may set."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_preset(cls, preset: str) -> Self:
        """The method with a preset's values; ValueError, which lists the presets, where there is no such preset."""
        if preset not in cls.presets:
            raise ValueError(unknown(f"method {cls.name!r} has no preset", preset, cls.presets))
        return cls(**cls.presets[preset])

    @classmethod
    def preset_for(cls, shape: ModelShape) -> str | None:
        """The default preset; where another preset is written for this shape and the default is not, the first such."""
        fits = [name for name, values in cls.presets.items() if values.get("shape") == shape.size]
        default = cls.default_preset
        return default if default is None or default in fits or not fits else fits[0]

    def unpublished(self, shape: ModelShape) -> Mapping[str, str]:
        """By option, whose value stands in where the paper prints none for a model of this shape."""
        return {}

    def fitted(self, shape: ModelShape) -> Self:
        """The method with its layer numbers scaled to this shape; ValueError where they may not be scaled."""
        return self

    def moved(self, shape: ModelShape) -> Mapping[str, object]:
        """Options that move published cuts to the nearest layers where they can be scored; empty where they can be."""
        return {}

    def schedule(self, shape: ModelShape) -> Schedule:
        """The stages for a model of this shape; ValueError where the hyper-parameters do not fit it."""
        raise NotImplementedError

    def score(self, signals: Signals) -> torch.Tensor:
        """One float32 score per surviving vision token of one image, [V]; higher means keep."""
        raise NotImplementedError
