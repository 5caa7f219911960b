"""VisiPruner and MustDrop: options, schedules, and decisions played over layers against the papers' rules."""

from dataclasses import dataclass
from math import nan
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hidrop.methods import METHODS, ModelShape
from vllm_hidrop.methods.adaptive import Adaptive, AttentionEdit, EncoderReduction, KeyLayer, Memory, Sight, Verdict
from vllm_hidrop.methods.mustdrop import MustDrop
from vllm_hidrop.methods.scoring import Contribution, Signals, TextAttention
from vllm_hidrop.methods.visipruner import VisiPruner
from vllm_hidrop.plan.schedule import Cached, KeepValue, Schedule, Stage

settings.load_profile("ci")  # no deadline on a shared machine, the same examples every time

Keeps = dict[int, KeepValue]


def all_from(*layers: int) -> Keeps:
    return dict.fromkeys((0, *layers), "all")


def as_dict(schedule: Schedule) -> Keeps:
    return {stage.first_layer: stage.keep.dump() for stage in schedule.stages}


def cached_in(schedule: Schedule) -> dict[int, Cached]:
    return {stage.first_layer: stage.cached for stage in schedule.stages if stage.cached is not Cached.KEPT}


def covered(schedule: Schedule) -> list[int]:
    return [
        layer
        for stage, end in zip(schedule.stages, schedule.end_layers, strict=True)
        for layer in range(stage.first_layer, end)
    ]


def seen(found: Contribution | TextAttention, protected: list[bool] | None = None) -> Signals:
    size = len(found[0])
    return Signals(
        layer=9,
        keep=size,
        num_image_tokens=size,
        survivors=torch.arange(size),
        statistic=found,
        protected=None if protected is None else torch.tensor(protected, dtype=torch.bool),
    )


def contributions(norm: list[float], cosine: list[float]) -> Signals:
    return seen(Contribution(torch.tensor(norm), torch.tensor(cosine)))


def told(verdict: Verdict) -> tuple[list[bool], bool]:
    assert verdict.stays.dtype == verdict.event.dtype == torch.bool
    assert verdict.event.shape == ()
    return verdict.stays.tolist(), bool(verdict.event)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[("visipruner", {"cosine": value}) for value in (nan, 1.01, -1.01)],
        *[("visipruner", {"exit_cosine": value}) for value in (nan, 1.01, -1.01)],
        *[("visipruner", {"norm": value}) for value in (nan, -0.1)],
        *[("visipruner", {option: 0}) for option in ("exit_count", "test_every")],
        *[("visipruner", {option: -1}) for option in ("shallow_layers", "keep")],
        ("visipruner", {"parts": ("shallow", "middle"), "exit_layer": 20}),
        ("visipruner", {"parts": ("shallow",), "filter_layer": 17}),
        ("visipruner", {"filter_layer": 17, "exit_layer": 17}),
        ("visipruner", {"shape": (0, 576)}),
        ("mustdrop", {"shape": (32, 0)}),
        *[("mustdrop", {"global_threshold": value}) for value in (nan, 1.01, -0.01)],
        *[("mustdrop", {"individual_threshold": value}) for value in (nan, 1.01, -0.01)],
        *[("mustdrop", {"key_rate": value}) for value in (nan, 1.01, -0.01)],
        *[("mustdrop", {"merge_threshold": value}) for value in (nan, 1.01, -1.01)],
        ("mustdrop", {"merge_window": 1}),
        *[("mustdrop", {"filter_layers": value}) for value in ((), (-1, 2), (2, 2), (6, 2))],
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(options)[-1]):
        METHODS[name](**options)


@pytest.mark.parametrize(
    "options",
    [
        {"cosine": -1.0, "exit_cosine": 1.0, "norm": 0.0, "exit_count": 1, "test_every": 1, "keep": 0},
        {"shallow_layers": 0, "parts": ()},
    ],
)
def test_the_ends_of_visipruners_ranges_are_allowed(options: dict[str, Any]) -> None:
    VisiPruner(**options)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_ends_of_mustdrops_ranges_are_allowed(end: float) -> None:
    MustDrop(global_threshold=end, individual_threshold=end, key_rate=end, merge_threshold=-end)


@pytest.mark.parametrize("name", ["visipruner", "mustdrop"])
def test_an_adaptive_method_is_a_decider(name: str) -> None:
    assert isinstance(METHODS[name](), Adaptive)


class TestVisiPrunerSchedule:
    """Zero-based: with six shallow layers, layer 6 is untouched and 7 is tested first, so 8 is the first boundary."""

    @pytest.mark.parametrize(
        ("options", "keeps"),
        [
            ({}, all_from(*range(8, 32))),
            ({"parts": ()}, all_from()),
            ({"parts": ("shallow",)}, all_from()),
            ({"parts": ("deep",)}, all_from()),
            ({"parts": ("shallow", "deep")}, all_from()),
            ({"parts": ("middle",)}, all_from(*range(8, 32))),
            ({"parts": ("middle", "deep")}, all_from(*range(8, 32))),
            ({"shallow_layers": 0}, all_from(*range(2, 32))),
            ({"shallow_layers": 30}, all_from()),
            ({"test_every": 4}, all_from(8, 12, 16, 20, 24, 28)),
            ({"exit_layer": 24}, all_from(*range(8, 24)) | {24: 0}),
            ({"exit_layer": 7}, all_from() | {7: 0}),
            ({"parts": ("deep",), "exit_layer": 24}, all_from() | {24: 0}),
            ({"parts": ("middle",), "filter_layer": 17}, {0: "all", 18: 16}),
            ({"filter_layer": 17, "keep": 9}, {0: "all"} | dict.fromkeys(range(18, 32), 9)),
            ({"filter_layer": 6, "parts": ("middle",), "drop_shallow_kv": True}, {0: "all", 6: "all", 7: 16}),
            ({"filter_layer": 17, "exit_layer": 24}, {0: "all", 18: 16, 24: 0}),
            ({"filter_layer": 6, "exit_layer": 31}, {0: "all", 7: 16, 31: 0}),
            ({"filter_layer": 17, "test_every": 5}, {0: "all", 18: 16, 23: 16, 28: 16}),
            ({"parts": ("shallow",), "drop_shallow_kv": True}, all_from(6)),
            ({"drop_shallow_kv": True}, all_from(6, *range(8, 32))),
            ({"drop_shallow_kv": True, "shallow_layers": 0}, all_from(*range(2, 32))),
        ],
    )
    def test_parts_choose_the_boundaries(self, options: dict[str, Any], keeps: Keeps) -> None:
        method = VisiPruner(**options)
        schedule = method.schedule(ModelShape(32, 576))
        assert as_dict(schedule) == keeps
        drops = method.drop_shallow_kv and method.shallow_layers
        assert cached_in(schedule) == ({0: Cached.NONE} if drops else {})

    @pytest.mark.parametrize(
        ("num_layers", "keeps"),
        [
            (40, {0: "all", 21: 16, 22: 16} | dict.fromkeys(range(23, 40), 16)),
            (16, {0: "all"} | dict.fromkeys(range(9, 16), 16)),
            (12, {0: "all"} | dict.fromkeys(range(7, 12), 16)),
            (8, {0: "all"} | dict.fromkeys(range(5, 8), 16)),
        ],
    )
    def test_a_calibrated_filter_scales_by_depth(self, num_layers: int, keeps: Keeps) -> None:
        # 16 of 32 is half way: layers 20, 8, 6 and 4 decide.
        method = VisiPruner(filter_layer=16, scale=True)
        assert as_dict(method.schedule(ModelShape(num_layers, 576))) == keeps

    @pytest.mark.parametrize(("num_layers", "first"), [(32, 8), (40, 10), (16, 5), (12, 4), (8, 4), (3, None)])
    def test_the_first_boundary_scales_by_depth(self, num_layers: int, first: int | None) -> None:
        keeps = as_dict(VisiPruner(scale=True).schedule(ModelShape(num_layers, 576)))
        assert keeps == (all_from() if first is None else all_from(*range(first, num_layers)))

    def test_a_fixed_exit_and_the_shallow_layers_scale_by_depth(self) -> None:
        method = VisiPruner(exit_layer=24, drop_shallow_kv=True, scale=True)
        assert as_dict(method.schedule(ModelShape(16, 576))) == all_from(3, *range(5, 12)) | {12: 0}
        assert method.fitted(ModelShape(16, 144)).shape == (16, 144)

    def test_the_larger_preset_is_for_forty_layers(self) -> None:
        schedule = VisiPruner.from_preset("llava-1.5-13b").schedule(ModelShape(40, 576))
        assert as_dict(schedule) == all_from(*range(8, 40))

    @pytest.mark.parametrize(
        "options",
        [{option: layer} for option in ("filter_layer", "exit_layer") for layer in (-1, 32)]
        + [{"filter_layer": 31}, {"filter_layer": 5}, {"exit_layer": 6}],
    )
    def test_fixed_layers_leave_layers_on_both_sides(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(options))} .* must leave layers on both sides"):
            VisiPruner(**options).schedule(ModelShape(32, 576))

    def test_another_depth_is_refused_unless_it_may_scale(self) -> None:
        with pytest.raises(ValueError, match="for 32 layers, the model has 40"):
            VisiPruner().schedule(ModelShape(40, 576))
        assert VisiPruner().fitted(ModelShape(32, 100)) == VisiPruner()

    @given(st.data())
    def test_every_layer_is_covered_once_and_judged_at_boundaries_only(self, data: st.DataObject) -> None:
        num_layers = data.draw(st.sampled_from([32, 40, 16, 12, 8]))
        method = VisiPruner(
            parts=data.draw(st.sampled_from([("middle",), ("middle", "deep"), ("shallow", "middle", "deep")])),
            shallow_layers=data.draw(st.integers(0, 8)),
            test_every=data.draw(st.integers(1, 5)),
            filter_layer=data.draw(st.sampled_from([None, 17])),
            drop_shallow_kv=data.draw(st.booleans()),
            scale=True,
        )
        shape = ModelShape(num_layers, 576)
        schedule = method.schedule(shape)
        assert covered(schedule) == list(range(num_layers))
        fitted = method.fitted(shape)
        firsts = {stage.first_layer for stage in schedule.stages}
        for memory in (None, 0, 1):
            assert {layer for layer in range(num_layers) if fitted.judges(layer, memory)} <= firsts


class TestVisiPrunerEdits:
    def test_layer_zero_has_a_sink_and_the_other_shallow_layers_none(self) -> None:
        sink = AttentionEdit(Sight.FIRST, vision_is_blind=True, renormalise=False)
        none = AttentionEdit(Sight.NONE, vision_is_blind=False, renormalise=False)
        assert [VisiPruner().edit(layer) for layer in range(8)] == [sink, *[none] * 5, None, None]

    def test_the_other_sink_and_the_other_form(self) -> None:
        method = VisiPruner.from_preset("llava-1.5-13b")
        assert method.edit(0) == AttentionEdit(Sight.SECOND_HALF, vision_is_blind=True, renormalise=False)
        masked = VisiPruner(form="pre_softmax")
        assert masked.edit(0) == AttentionEdit(Sight.FIRST, vision_is_blind=True, renormalise=True)
        assert masked.edit(1) == AttentionEdit(Sight.NONE, vision_is_blind=False, renormalise=True)

    def test_without_the_shallow_part_nothing_is_edited(self) -> None:
        assert not any(VisiPruner(parts=("middle", "deep")).edit(layer) for layer in range(32))
        assert VisiPruner(shallow_layers=0).edit(0) is None
        assert VisiPruner().reduction is None


class TestVisiPrunerVerdicts:
    """The cosine decides when, the norm decides which; both strictly."""

    @pytest.mark.parametrize(
        ("norm", "cosine", "stays", "event"),
        [
            ([0.1, 0.3, 0.5], [1.0, 1.0, 0.996], [True, True, True], False),
            ([0.1, 0.3, 0.5], [0.9, 1.0, 1.0], [False, True, True], True),
            ([0.2, 0.1], [0.9, 0.9], [False, False], True),
            ([0.3, 0.3], [0.9, 0.9], [True, True], True),
            ([0.1, 0.1], [0.995, 0.995], [True, True], False),
            ([0.1, 0.3], [nan, nan], [True, True], False),
            ([nan, 0.3], [nan, 0.9], [False, True], True),
            ([], [], [], False),
        ],
    )
    def test_before_the_cut(self, norm: list[float], cosine: list[float], stays: list[bool], event: bool) -> None:
        assert told(VisiPruner().judge(contributions(norm, cosine), None)) == (stays, event)

    @pytest.mark.parametrize(
        ("memory", "cosine", "stays", "event"),
        [
            (0, [1.0, 1.0], True, True),
            (1, [1.0, 1.0], False, True),
            (1, [1.0, 0.99], True, False),
            (1, [0.999, 0.999], False, True),
            (1, [nan, 1.0], False, True),
            (2, [1.0], False, True),
            (1, [], False, True),
        ],
    )
    def test_after_the_cut(self, memory: int, cosine: list[float], stays: bool, event: bool) -> None:
        verdict = VisiPruner().judge(contributions([9.0] * len(cosine), cosine), memory)
        assert told(verdict) == ([stays] * len(cosine), event)

    @pytest.mark.parametrize(
        ("keep", "norm", "stays"),
        [
            (2, [0.1, 0.4, 0.3], [False, True, True]),
            (2, [0.5, 0.5, 0.5], [True, True, False]),
            (1, [nan, 0.01], [False, True]),
            (5, [0.1, 0.2], [True, True]),
            (0, [0.1, 0.2], [False, False]),
            (2, [], []),
        ],
    )
    def test_a_calibrated_layer_keeps_the_largest_norms(self, keep: int, norm: list[float], stays: list[bool]) -> None:
        verdict = VisiPruner(filter_layer=17, keep=keep).judge(contributions(norm, [1.0] * len(norm)), None)
        assert told(verdict) == (stays, True)

    def test_memory(self) -> None:
        in_a_row, in_all = VisiPruner(), VisiPruner(exit_consecutive=False)
        for method in (in_a_row, in_all):
            assert method.remember(None, False) is None
            assert [method.remember(memory, True) for memory in (None, 0, 1)] == [0, 1, 2]
            assert method.remember(0, False) == 0
        assert in_a_row.remember(1, False) == 0
        assert in_all.remember(1, False) == 1

    def test_who_is_asked_when(self) -> None:
        def asked(memory: Memory, **options: Any) -> list[int]:
            return [layer for layer in range(32) if VisiPruner(**options).judges(layer, memory)]

        everywhere = list(range(8, 32))
        assert asked(None) == asked(0) == asked(1) == everywhere
        assert asked(None, parts=("middle",)) == everywhere
        assert asked(0, parts=("middle",)) == []
        assert asked(None, parts=("shallow", "deep")) == asked(0, parts=("shallow", "deep")) == []
        assert asked(None, filter_layer=17) == [18]
        assert asked(0, filter_layer=17) == list(range(19, 32))
        assert asked(0, filter_layer=17, exit_layer=24) == []
        assert asked(None, exit_layer=24) == list(range(8, 24))
        assert asked(0, exit_layer=24) == []


@dataclass
class Layer:
    """What each token of an image adds in one layer."""

    norm: list[float]
    cosine: list[float]


NUM_LAYERS = 12
THRESHOLDS: dict[str, Any] = {"cosine": 0.5, "exit_cosine": 0.75, "norm": 0.25}
"""Exact in float32, so that equality is."""


@st.composite
def runs(draw: st.DrawFn) -> list[Layer]:
    """Statistics of every layer, often at or beside a threshold."""
    size = draw(st.integers(1, 4))
    # The cut and the exit must both be likely: most tokens agree with the whole.
    cosine = st.one_of(st.just(1.0), st.sampled_from([1.0, 1.0, 0.75, 0.625, 0.5, 0.375, nan]))
    norm = st.sampled_from([0.0, 0.25, 0.375, 1.0, nan])
    layer = st.builds(Layer, *(st.lists(each, min_size=size, max_size=size) for each in (norm, cosine)))
    return draw(st.lists(layer, min_size=NUM_LAYERS, max_size=NUM_LAYERS))


def by_the_rules(method: VisiPruner, layers: list[Layer]) -> list[list[int]]:
    """Tokens held in every layer: specification, sections 3 and 4."""
    left = list(range(len(layers[0].norm)))
    has_cut, passed, held = False, 0, []
    for number, layer in enumerate(layers):
        held.append(left)
        if number <= method.shallow_layers or (number - method.shallow_layers - 1) % method.test_every:
            continue
        if not has_cut:
            has_cut = any(layer.cosine[token] < method.cosine for token in left)
            left = [token for token in left if layer.norm[token] > method.norm] if has_cut else left
            continue
        if any(layer.cosine[token] < method.exit_cosine for token in left):
            passed = 0 if method.exit_consecutive else passed
        else:
            passed += 1
        left = [] if "deep" in method.parts and passed >= method.exit_count else left
    return held


def played(method: VisiPruner, layers: list[Layer]) -> list[list[int]]:
    """The same, stage by stage as the engine asks."""
    left, memory, held = list(range(len(layers[0].norm))), None, []
    starts = {stage.first_layer for stage in method.schedule(ModelShape(NUM_LAYERS, 576)).stages}
    for number in range(NUM_LAYERS):
        if number in starts and left and method.judges(number, memory):
            before = layers[number - 1]
            own = contributions([before.norm[i] for i in left], [before.cosine[i] for i in left])
            stays, event = told(method.judge(own, memory))
            left = [token for token, stay in zip(left, stays, strict=True) if stay]
            memory = method.remember(memory, event)
        held.append(left)
    return held


@settings(max_examples=500)
@given(
    layers=runs(),
    shallow_layers=st.integers(0, 4),
    test_every=st.integers(1, 3),
    exit_count=st.integers(1, 3),
    exit_consecutive=st.booleans(),
    has_exit=st.booleans(),
)
def test_visipruner_plays_by_the_rules(
    layers: list[Layer],
    shallow_layers: int,
    test_every: int,
    exit_count: int,
    exit_consecutive: bool,
    has_exit: bool,
) -> None:
    method = VisiPruner(
        parts=("middle", "deep") if has_exit else ("middle",),
        shallow_layers=shallow_layers,
        test_every=test_every,
        exit_count=exit_count,
        exit_consecutive=exit_consecutive,
        shape=(NUM_LAYERS, 576),
        **THRESHOLDS,
    )
    assert played(method, layers) == by_the_rules(method, layers)


def test_visipruners_presets_are_the_published_values() -> None:
    assert VisiPruner() == VisiPruner.from_preset("llava-1.5-7b")
    own = VisiPruner()
    assert (own.shallow_layers, own.cosine, own.norm) == (6, 0.995, 0.2)
    assert (own.exit_cosine, own.exit_count, own.sink, own.form) == (0.999, 2, "first", "substitution")
    assert VisiPruner.from_preset("llava-1.5-13b") == VisiPruner(sink="half", shape=(40, 576))


class TestMustDrop:
    @pytest.mark.parametrize(
        ("preset", "of_all", "of_each"), [("tok192", 0.001, 0.001), ("tok128", 0.0012, 0.001), ("tok64", 0.011, 0.01)]
    )
    def test_a_preset_has_the_released_thresholds(self, preset: str, of_all: float, of_each: float) -> None:
        own = MustDrop(global_threshold=of_all, individual_threshold=of_each)
        assert MustDrop.from_preset(preset) == own

    def test_the_default_is_the_papers(self) -> None:
        assert MustDrop.default_preset is not None
        assert MustDrop() == MustDrop.from_preset(MustDrop.default_preset)
        assert MustDrop().filter_layers == (2, 6, 10, 14)
        assert MustDrop().reduction == EncoderReduction(0.8, 3, 0.08, KeyLayer.LAST)

    def test_the_encoder_part_can_be_changed_and_switched_off(self) -> None:
        assert MustDrop(merge_threshold=None, key_rate=0).reduction is None
        keys_only = MustDrop(merge_threshold=None, key_layer="feature")
        assert keys_only.reduction == EncoderReduction(None, 3, 0.08, KeyLayer.FEATURE)
        merging_only = MustDrop(key_rate=0, merge_threshold=0, merge_window=2)
        assert merging_only.reduction == EncoderReduction(0, 2, 0, KeyLayer.LAST)

    @pytest.mark.parametrize(
        ("num_layers", "filters"),
        [
            (32, (2, 6, 10, 14)),
            (40, (2, 8, 12, 18)),
            (16, (1, 3, 5, 7)),
            (12, (1, 2, 4, 5)),
            (8, (0, 2, 3, 4)),
            (3, (0, 1)),
            (2, (0,)),
        ],
    )
    def test_filters_and_boundaries_scale_by_depth(self, num_layers: int, filters: tuple[int, ...]) -> None:
        method, shape = MustDrop(scale=True), ModelShape(num_layers, 576)
        assert method.fitted(shape).filter_layers == filters
        schedule = method.schedule(shape)
        assert as_dict(schedule) == all_from(*sorted({filters[0], *(layer + 1 for layer in filters)}))
        assert covered(schedule) == list(range(num_layers))
        assert all(stage.cached is Cached.FINAL for stage in schedule.stages if stage.first_layer >= filters[0])
        assert all(stage.cached is Cached.KEPT for stage in schedule.stages if stage.first_layer < filters[0])
        uncut = MustDrop(scale=True, cut_cache=False).schedule(shape)
        assert as_dict(uncut) == all_from(*(layer + 1 for layer in filters))
        assert cached_in(uncut) == {}

    def test_the_first_two_layers_keep_their_whole_cache(self) -> None:
        schedule = MustDrop().schedule(ModelShape(32, 576))
        assert schedule.stages[0] == Stage(0, schedule.stages[0].keep, Cached.KEPT)
        assert cached_in(schedule) == dict.fromkeys((2, 3, 7, 11, 15), Cached.FINAL)

    def test_another_depth_is_refused_unless_it_may_scale(self) -> None:
        with pytest.raises(ValueError, match="for 32 layers, the model has 40"):
            MustDrop().schedule(ModelShape(40, 576))
        with pytest.raises(ValueError, match="for 32 layers, the model has 16"):
            MustDrop().fitted(ModelShape(16, 576))

    def test_a_filter_in_the_last_layer_is_refused(self) -> None:
        assert as_dict(MustDrop(filter_layers=(30,)).schedule(ModelShape(32, 576))) == all_from(30, 31)
        with pytest.raises(ValueError, match="no layer is left after filter layer 31 of 32"):
            MustDrop(filter_layers=(2, 31)).schedule(ModelShape(32, 576))

    def test_it_judges_behind_filter_layers_only(self) -> None:
        assert [layer for layer in range(32) if MustDrop().judges(layer, None)] == [3, 7, 11, 15]
        assert MustDrop().remember(None, True) is None

    @pytest.mark.parametrize(
        ("total", "peak", "stays"),
        [
            # A quarter of all is 1; a single row must pay 0.5.
            ([0.5, 0.5, 3.0, 0.0], [0.25, 0.5, 0.25, 0.0], [False, True, True, False]),
            ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [True] * 4),
            ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [True] * 4),
            ([0.0, 4.0, 0.0, 0.0], [nan, 0.0, 0.0, 0.0], [True, True, False, False]),
            ([nan, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [True] * 4),
            ([], [], []),
        ],
    )
    def test_a_token_goes_that_is_weak_to_all_and_to_each(
        self, total: list[float], peak: list[float], stays: list[bool]
    ) -> None:
        method = MustDrop(global_threshold=0.25, individual_threshold=0.5)
        attention = TextAttention(torch.tensor(total), torch.tensor(peak))
        assert told(method.judge(seen(attention), None)) == (stays, False)
        everything = [True] * len(total)
        assert told(method.judge(seen(attention, protected=everything), None)) == (everything, False)

    @given(st.data())
    def test_the_dual_test_spares_key_tokens(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(1, 20))
        totals, peaks = ([data.draw(st.integers(0, 8)) / 8 for _ in range(size)] for _ in range(2))
        keys = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
        method = MustDrop(global_threshold=0.125, individual_threshold=0.5)
        stays, _ = told(method.judge(seen(TextAttention(torch.tensor(totals), torch.tensor(peaks)), keys), None))
        bound = sum(totals) / 8
        assert stays == [
            key or total >= bound or peak >= 0.5 for key, total, peak in zip(keys, totals, peaks, strict=True)
        ]

    def test_thresholds_of_zero_drop_nothing(self) -> None:
        attention = TextAttention(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
        for method in (MustDrop(global_threshold=0), MustDrop(individual_threshold=0)):
            assert told(method.judge(seen(attention), None))[0] == [True, True]
