"""The contract every row of METHODS keeps, and the papers' own schedules."""

import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hidrop.config import make_method
from vllm_hidrop.methods import METHODS, Adaptive, Method, ModelShape
from vllm_hidrop.methods.hidrop import HiDrop
from vllm_hidrop.methods.scoring import Signals, Statistic, select_top
from vllm_hidrop.plan.places import Span
from vllm_hidrop.plan.plan import make_plan
from vllm_hidrop.plan.schedule import KeepValue, Schedule
from vllm_hidrop.plan.signal import Signal
from vllm_hidrop.staged.signals import SIGNALS

settings.load_profile("ci")  # no deadline on a shared machine, the same examples every time

PAPER = ModelShape(num_layers=32, tokens_per_image=576)
PRESETS = [(name, preset) for name, method in METHODS.items() for preset in (None, *method.presets)]
HIDROP_PRESETS = list(HiDrop.presets)
shapes = st.builds(ModelShape, st.integers(3, 96), st.integers(1, 3_000))


def for_any_shape(name: str, preset: str | None) -> Method:
    """A method of the table; one written for a single shape is told to scale."""
    method = make_method(name, preset)
    has_scale = any(field.name == "scale" for field in dataclasses.fields(method))
    return make_method(name, preset, {"scale": True}) if has_scale else method


def as_dict(schedule: Schedule) -> dict[int, KeepValue]:
    return {stage.first_layer: stage.keep.dump() for stage in schedule.stages}


def by_layer(schedule: Schedule, num_tokens: int) -> list[int]:
    kept = schedule.kept(num_tokens)
    return [kept[schedule.stage_of_layer(layer)] for layer in range(schedule.num_layers)]


def test_a_row_is_named_as_its_method() -> None:
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_tells_its_source_and_its_deviations(name: str) -> None:
    method = METHODS[name]
    assert method.paper
    assert method.summary
    assert method.__doc__ is not None
    assert all(f"**{part}**" in method.__doc__ for part in ("Source", "Differs", "Options"))
    assert method.default_preset is None or method.default_preset in method.presets


@pytest.mark.parametrize("name", METHODS)
def test_a_method_cannot_be_changed(name: str) -> None:
    method = METHODS[name]()
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, None)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
@given(shape=shapes)
def test_a_schedule_covers_every_layer_once(name: str, preset: str | None, shape: ModelShape) -> None:
    schedule = for_any_shape(name, preset).schedule(shape)
    assert schedule.num_layers == shape.num_layers
    assert sum(schedule.layers_in(stage) for stage in range(len(schedule.stages))) == shape.num_layers
    make_plan(schedule, shape.tokens_per_image + 9, [Span(4, shape.tokens_per_image)])


def statistic(signal: Signal, size: int) -> Statistic | None:
    """Some statistic of the kind that a signal comes to; None where there is none."""
    if signal is Signal.NONE:
        return None
    (kind,) = get_args(get_type_hints(SIGNALS[signal])["return"])
    found: Statistic = kind(*(torch.linspace(0, 1, size) for _ in kind._fields))
    return found


@pytest.mark.parametrize(("name", "preset"), PRESETS)
@given(data=st.data())
def test_a_score_is_one_float32_per_survivor(name: str, preset: str | None, data: st.DataObject) -> None:
    method = make_method(name, preset)
    survivors = sorted(data.draw(st.sets(st.integers(0, 575), min_size=2, max_size=80)))
    keep = data.draw(st.integers(1, len(survivors) - 1))
    signals = Signals(4, keep, 576, torch.tensor(survivors), statistic(method.signal, len(survivors)))
    if name == "none" or isinstance(method, Adaptive):  # no cut to score at; it judges, see test_adaptive_methods.py
        with pytest.raises(NotImplementedError):
            method.score(signals)
        return
    scores = method.score(signals)
    assert scores.shape == (len(survivors),)
    assert scores.dtype == torch.float32
    assert len(select_top(scores, keep)) == keep


@pytest.mark.parametrize(("preset", "total"), [("tok48", 1536), ("tok64", 2048), ("tok80", 2561), ("tok48-c1", 1538)])
def test_a_hidrop_preset_runs_the_released_number_of_vision_rows(preset: str, total: int) -> None:
    schedule = HiDrop.from_preset(preset).schedule(PAPER)
    assert sum(by_layer(schedule, 576)) == total
    assert schedule.mean_kept(576) == total / 32


@pytest.mark.parametrize(
    ("preset", "window"),
    [
        ("tok48", [576] * 2 + [87] * 4 + [10] * 2 + [5] * 2 + [1] * 6),
        ("tok64", [576] * 2 + [215] * 4 + [10] * 2 + [5] * 2 + [1] * 6),
        ("tok80", [576] * 2 + [453] * 3 + [10] * 3 + [5] * 3 + [1] * 5),
        ("tok48-c1", [576] * 2 + [112] * 3 + [10] * 3 + [5] * 3 + [1] * 5),
    ],
)
def test_a_hidrop_preset_has_the_released_count_in_every_layer(preset: str, window: list[int]) -> None:
    assert by_layer(HiDrop.from_preset(preset).schedule(PAPER), 576) == [0] * 8 + window + [0] * 8


def test_the_default_hidrop_is_its_default_preset() -> None:
    assert HiDrop.default_preset is not None
    assert HiDrop() == HiDrop.from_preset(HiDrop.default_preset)


@pytest.mark.parametrize(
    ("name", "keeps"),
    [
        ("none", {0: "all"}),
        ("fastv", {0: "all", 2: 0.5}),
        ("pyramiddrop", {0: "all", 8: 0.5, 16: 0.25, 24: 0.125}),
        ("random", {0: "all", 2: 0.5}),
        ("uniform", {0: "all", 2: 0.5}),
    ],
)
def test_a_default_schedule_is_the_published_one(name: str, keeps: dict[int, KeepValue]) -> None:
    assert as_dict(METHODS[name]().schedule(PAPER)) == keeps


@pytest.mark.parametrize(
    ("preset", "num_layers", "tokens_per_image", "keeps"),
    [
        ("tok48", 16, 576, {0: 0, 4: "all", 5: 87, 7: 10, 8: 5, 9: 1, 12: 0}),
        ("tok48", 32, 144, {0: 0, 8: "all", 10: 22, 14: 2, 16: 1, 18: 1, 24: 0}),
        ("tok48", 40, 576, {0: 0, 10: "all", 12: 87, 18: 10, 20: 5, 22: 1, 30: 0}),
        # Four layers have room for one cut between injection (1) and exit (3).
        ("tok48", 4, 576, {0: 0, 1: "all", 2: 87, 3: 0}),
        ("embedded", 24, 576, {0: 0, 4: "all", 6: 96, 8: 24, 16: 0}),
    ],
)
def test_a_hidrop_schedule_scales_by_depth_and_by_image_size(
    preset: str, num_layers: int, tokens_per_image: int, keeps: dict[int, KeepValue]
) -> None:
    method = make_method("hidrop", preset, {"scale": True})
    assert as_dict(method.schedule(ModelShape(num_layers, tokens_per_image))) == keeps


@pytest.mark.parametrize("preset", HIDROP_PRESETS)
def test_scaling_a_hidrop_schedule_to_its_own_shape_changes_nothing(preset: str) -> None:
    method = HiDrop.from_preset(preset)
    shape = ModelShape(*method.shape)
    assert method.scaled(shape).schedule(shape) == method.schedule(shape)


@given(num_layers=st.integers(3, 64), inject=st.integers(1, 31))
def test_scaling_never_loses_the_window_between_injection_and_exit(num_layers: int, inject: int) -> None:
    method = HiDrop(inject_layer=inject, exit_layer=inject + 1, filter_layers=(), keeps=(), scale=True)
    if round((inject - 1) * num_layers / 32) < num_layers:
        schedule = method.schedule(ModelShape(num_layers, 576))
        assert schedule.mean_kept(576) > 0


def test_a_hidrop_schedule_for_other_depths_is_refused_unless_it_may_scale() -> None:
    with pytest.raises(ValueError, match="for 32 layers, the model has 40"):
        HiDrop().schedule(ModelShape(40, 576))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter_layers": (10,)}, "must pair up, got 1 and 4"),
        ({"inject_layer": 0}, "one-based, got 0"),
        ({"exit_layer": 9}, "must rise"),
        ({"inject_layer": 12}, "must rise"),
        ({"filter_layers": (10, 10, 16, 18)}, "must rise"),
        ({"filter_layers": (10, 14, 16, 24)}, "must rise"),
    ],
)
def test_hidrop_layers_that_cannot_be_stages_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method("hidrop", None, options)


def test_fastv_can_exit() -> None:
    schedule = make_method("fastv", None, {"exit_layer": 20}).schedule(PAPER)
    assert as_dict(schedule) == {0: "all", 2: 0.5, 20: 0}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fastv", {"layer": 0}, "layer must be >= 1"),
        ("pyramiddrop", {"cuts": [0.5]}, "must pair up, got 1 and 3"),
        ("random", {"seed": -1}, "seed must be >= 0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"method '{name}': .*{message}"):
        make_method(name, None, options)


def test_the_base_method_decides_nothing() -> None:
    with pytest.raises(NotImplementedError):
        Method().schedule(PAPER)
