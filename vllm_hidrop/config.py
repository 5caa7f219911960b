"""The user's choice of method, checked and resolved for one model.

It travels as ``additional_config={"hidrop": {...}}`` in vLLM's configuration, keyed by the fields of
:class:`HidropConfig`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vllm_hidrop.methods import METHODS, Method, ModelShape
from vllm_hidrop.methods.base import PUBLISHED_FAMILY, PUBLISHED_SIZE, SCALED
from vllm_hidrop.methods.scored_layers import check_scored_layers
from vllm_hidrop.plan.names import nearest, unknown
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.plan.schedule import Schedule

FORCE = 'force it with --force (in a configuration, "force": true)'  # to serve what a checkpoint was not trained for


class HidropConfig(BaseModel):
    """What a user may set; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str | None = Field(None, description="name of a pruning method; default: the checkpoint's, else none")
    preset: str | None = Field(None, description="named schedule of the method; default: the checkpoint's own")
    options: dict[str, Any] = Field({}, description="the method's hyper-parameters, over the preset's")
    positions: PositionScheme | None = Field(None, description="default: the checkpoint's, else persistent")
    prefix_state_bytes: int = Field(
        1 << 28, ge=0, description="memory for reusing images in later prompts under methods that cut; 0: not reused"
    )
    force: bool = Field(False, description="serve a schedule or positions the checkpoint was not trained for")
    note: str | None = Field(None, description="where the numbers come from, printed at start; changes nothing")

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """Check keys and types. Raises ValueError: one line that names the wrong key and the known ones."""
        try:
            return cls(**data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            known = ", ".join(cls.model_fields)
            hint = _meant(where, data) if first["type"] == "extra_forbidden" else ""
            raise ValueError(f"hidrop configuration: {where}: {first['msg']}; known keys: {known}{hint}") from None

    @classmethod
    def checked(cls, data: Mapping[str, Any]) -> Self:
        """Do :meth:`parse`, then check the method as far as it goes without a model. Raises ValueError: one line."""
        config = cls.parse(data)
        if config.method is not None:
            make_method(config.method, config.preset, config.options)
        return config


def _meant(key: str, data: Mapping[str, Any]) -> str:
    """A hint what an unknown key was meant to be: a method's option in the wrong place, or a key spelt like it."""
    method = data.get("method")
    candidates = {method: METHODS[method]} if isinstance(method, str) and method in METHODS else METHODS
    owners = [name for name, cls in candidates.items() if key in cls.option_names()]
    if not owners:
        return nearest(key, HidropConfig.model_fields)
    return f'; {key!r} is an option of {", ".join(owners)}: put it under "options"'


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A method, its schedule for one model, and the model's positions.

    ``moved`` are those of the ``options`` that move published cuts to layers of this model that have attention.
    """

    method: Method
    preset: str | None
    options: Mapping[str, Any]
    schedule: Schedule
    positions: PositionScheme = PositionScheme.PERSISTENT
    moved: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def resolve(config: HidropConfig, shape: ModelShape, trained: Mapping[str, Any] | None = None) -> Resolved:
    """Choose method, preset and schedule; ``trained`` is the ``hidrop`` entry of the checkpoint's ``config.json``.

    Raises:
        ValueError: unknown method, preset or option, a schedule that does not fit the model, or a schedule or
            positions the checkpoint was not trained for, without ``force``.
    """
    own = HidropConfig.parse(trained) if trained else HidropConfig.parse({})
    trained_positions = own.positions or PositionScheme.PERSISTENT
    positions = config.positions or trained_positions
    if trained and positions is not trained_positions and not config.force:
        raise ValueError(
            f"this checkpoint was trained with {trained_positions} positions, not {positions}; serve those, or {FORCE}"
        )
    if config.method is None and config.preset is None and not config.options:
        config = config.model_copy(update=own.model_dump(exclude={"force", "positions", "prefix_state_bytes"}))
    name = config.method or own.method or "none"
    preset = config.preset or (own.preset if name == own.method else METHODS[_known(name)].preset_for(shape))
    if own.method and name == own.method and preset != own.preset and not config.force:
        raise ValueError(
            f"this checkpoint was trained for {own.method} preset {own.preset!r}, not {preset!r}; "
            f"serve that one, or {FORCE}"
        )
    is_own = name == own.method and preset == own.preset
    options = own.options | config.options if is_own else dict(_scaled(METHODS[_known(name)], config.options, shape))
    moved = moved_options(name, preset, options, shape)
    schedule = _schedule(name, preset, options | moved, shape)
    own_options = own.options | moved_options(name, preset, own.options, shape) if is_own else {}
    if is_own and not config.force and schedule != _schedule(name, preset, own_options, shape):
        raise ValueError(
            f"this checkpoint was trained for {own.method} with options {own.options}, not {options}; "
            f"serve those, or {FORCE}"
        )
    method = make_method(name, preset, options | moved).fitted(shape)
    return Resolved(method, preset, options | moved, schedule, positions, moved)


def _scaled(method: type[Method], options: Mapping[str, Any], shape: ModelShape) -> Mapping[str, Any]:
    """The options, and ``scale`` where a training-free method's layers are neither given nor published for a family."""
    given = {"scale", "shape", *method.layer_options} & options.keys()
    is_free = "scale" in method.option_names() and not method.needs_training
    return {**options, "scale": True} if is_free and not given and shape.family != PUBLISHED_FAMILY else options


def provenance(resolved: Resolved, shape: ModelShape, trained: Mapping[str, Any] | None = None) -> str | None:
    """A line on numbers that are not the paper's for this model; None where they are, or belong to the checkpoint."""
    method, preset = resolved.method, METHODS[resolved.method.name].presets.get(resolved.preset or "", {})
    if (trained or {}).get("method") == method.name:
        return None
    size: Any = resolved.options.get("shape") or preset.get("shape") or PUBLISHED_SIZE
    is_elsewhere = shape.family != PUBLISHED_FAMILY
    given = resolved.options.keys() | (preset.keys() if "shape" in preset and not is_elsewhere else set())
    carried = [option for option in method.tuned_options if option not in given]
    parts = []
    is_scaled = "scale" in method.option_names() and size[0] != shape.num_layers
    if carried and (is_elsewhere or is_scaled):
        parts.append(f"{SCALED}: {', '.join(carried)} {'is' if len(carried) == 1 else 'are'} {PUBLISHED_FAMILY}'s")
    borrowed = {option: owner for option, owner in method.unpublished(shape).items() if option not in given}
    for owner in dict.fromkeys(borrowed.values()):
        options = ", ".join(option for option in borrowed if borrowed[option] == owner)
        parts.append(f"unpublished: {options} are {owner}'s")
    return f"method {method.name!r} on {shape.family}: {'; '.join(parts)}" if parts else None


def training_warning(resolved: Resolved, trained: Mapping[str, Any] | None) -> str | None:
    """A line to print if the method needs training that the checkpoint's ``hidrop`` entry, ``trained``, lacks."""
    name = resolved.method.name
    if not resolved.method.needs_training or (trained or {}).get("method") == name:
        return None
    return (
        f"method {name!r} is for checkpoints trained with it, and this one does not say that it was: expect wrong "
        "answers. Train it (hidrop train), or choose a method that needs no training (hidrop methods)"
    )


def moved_note(resolved: Resolved) -> str | None:
    """A line to print if the method's published cuts lie elsewhere in this model."""
    if not resolved.moved:
        return None
    moved = ", ".join(f"{option} {value}" for option, value in resolved.moved.items())
    return (
        f"cuts of {resolved.method.name} are scored by attention, which not every layer of this model has: "
        f"moved to {moved}"
    )


def moved_options(name: str, preset: str | None, options: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """The options, none of them among the user's, that move a method's cuts to layers with attention."""
    moved = make_method(name, preset, options).moved(shape)
    return {key: value for key, value in moved.items() if key not in options}


def _schedule(name: str, preset: str | None, options: Mapping[str, Any], shape: ModelShape) -> Schedule:
    method = make_method(name, preset, options)
    try:
        schedule = method.schedule(shape)
        check_scored_layers(method.fitted(shape), schedule, shape)
    except ValueError as error:
        raise ValueError(f"method {name!r}: {error}") from None
    return schedule


def make_method(name: str, preset: str | None = None, options: Mapping[str, Any] | None = None) -> Method:
    """Build a method; ``options`` go over the preset's. Raises ValueError: an unknown name, or a value not allowed."""
    cls = METHODS[_known(name)]
    method = cls() if preset is None else cls.from_preset(preset)
    known = cls.option_names()
    for key in options or {}:
        if key not in known:
            raise ValueError(unknown(f"method {name!r} has no option", key, known))
    changes = {key: _option(cls, key, value) for key, value in (options or {}).items()}
    try:
        return dataclasses.replace(method, **changes)
    except ValueError as error:
        raise ValueError(f"method {name!r}: {error}") from None


def _option(cls: type[Method], key: str, value: object) -> Any:
    """Check an option's type strictly; a list stands for a tuple, which JSON lacks."""
    adapter: TypeAdapter[Any] = TypeAdapter(get_type_hints(cls)[key])
    try:
        return adapter.validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except ValidationError as error:
        message = " or ".join(dict.fromkeys(each["msg"] for each in error.errors()))
        raise ValueError(f"method {cls.name!r}: option {key!r}: {message}, got {value!r}") from None


def _known(name: str) -> str:
    if name not in METHODS:
        raise ValueError(unknown("unknown pruning method", name, METHODS))
    return name
