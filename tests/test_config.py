"""The user's choice, resolved for a checkpoint, or refused with the reason."""

from dataclasses import replace
from typing import Any

import pytest

from vllm_hidrop.config import HidropConfig, Resolved, make_method, provenance, resolve, training_warning
from vllm_hidrop.methods import ModelShape
from vllm_hidrop.methods.base import PUBLISHED_FAMILY, SCALED
from vllm_hidrop.methods.visipruner import VisiPruner
from vllm_hidrop.models.families import FAMILIES
from vllm_hidrop.models.family import Family

PAPER = ModelShape(num_layers=32, tokens_per_image=576)
TRAINED = {"method": "hidrop", "preset": "tok48"}


def resolved(choice: dict[str, Any], trained: dict[str, Any] | None = None) -> Resolved:
    return resolve(HidropConfig.parse(choice), PAPER, trained)


@pytest.mark.parametrize(
    ("choice", "trained", "method", "preset"),
    [
        ({}, None, "none", None),
        ({"method": "fastv"}, None, "fastv", None),
        ({"method": "hidrop"}, None, "hidrop", "tok64"),
        ({"method": "hidrop", "preset": "tok80"}, None, "hidrop", "tok80"),
        ({}, TRAINED, "hidrop", "tok48"),
        ({"method": "hidrop"}, TRAINED, "hidrop", "tok48"),
        ({"preset": "tok48"}, TRAINED, "hidrop", "tok48"),
        ({"method": "none"}, TRAINED, "none", None),
        ({"method": "fastv"}, TRAINED, "fastv", None),
        ({"preset": "tok64", "force": True}, TRAINED, "hidrop", "tok64"),
    ],
)
def test_a_choice_falls_back_on_the_checkpoints_own(
    choice: dict[str, Any], trained: dict[str, Any] | None, method: str, preset: str | None
) -> None:
    found = resolved(choice, trained)
    assert (found.method.name, found.preset) == (method, preset)
    assert found.schedule == found.method.schedule(PAPER)


@pytest.mark.parametrize("choice", [{"preset": "tok64"}, {"method": "hidrop", "preset": "tok80"}])
def test_a_preset_the_checkpoint_was_not_trained_for_is_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"trained for hidrop preset 'tok48', not .*\"force\": true"):
        resolved(choice, TRAINED)


def test_options_that_change_the_trained_schedule_are_refused_unless_forced() -> None:
    choice = {"options": {"keeps": [50, 10, 5, 1]}}
    with pytest.raises(ValueError, match="trained for hidrop with options"):
        resolved(choice, TRAINED)
    assert resolved(choice | {"force": True}, TRAINED).schedule.kept(576)[2] == 50


@pytest.mark.parametrize("choice", [{}, {"method": "fastv"}])
def test_positions_are_the_checkpoints_own_whatever_the_method(choice: dict[str, Any]) -> None:
    assert resolved(choice).positions == "persistent"
    assert resolved(choice, TRAINED).positions == "persistent"
    assert resolved(choice, TRAINED | {"positions": "grouped"}).positions == "grouped"


def test_positions_the_checkpoint_was_not_trained_for_are_refused_unless_forced() -> None:
    choice = {"positions": "compacted"}
    assert resolved(choice | {"method": "fastv"}).positions == "compacted"
    with pytest.raises(ValueError, match=r"trained with persistent positions, not compacted; .*\"force\": true"):
        resolved(choice, TRAINED)
    assert resolved(choice | {"force": True}, TRAINED).positions == "compacted"


def test_options_that_leave_the_trained_schedule_as_it_is_are_allowed() -> None:
    assert resolved({"options": {"keeps": [87, 10, 5, 1]}}, TRAINED) == Resolved(
        make_method("hidrop", "tok48"), "tok48", {"keeps": [87, 10, 5, 1]}, resolved({}, TRAINED).schedule
    )


def test_naming_the_checkpoints_method_keeps_its_trained_options() -> None:
    trained = {"method": "hidrop", "options": {"keeps": [50, 10, 5, 1]}}
    assert resolved({"method": "hidrop"}, trained) == resolved({}, trained)
    assert resolved({}, trained).schedule.kept(576)[2] == 50


def test_an_option_goes_over_the_presets_value() -> None:
    found = resolved({"method": "hidrop", "preset": "tok80", "options": {"exit_layer": None}})
    assert found.schedule.kept(576) == (0, 576, 453, 10, 5, 1)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"method": "hidrp"}, r"unknown pruning method 'hidrp'; known: none, hidrop, fastv, "),
        ({"method": "hidrop", "preset": "tok1"}, r"no preset 'tok1'; known: tok48, tok64, tok80, "),
        ({"method": "fastv", "preset": "tok48"}, r"'fastv' has no preset 'tok48': there are none"),
        ({"method": "fastv", "options": {"layr": 3}}, r"no option 'layr'; known: layer, keep, exit_layer"),
        ({"method": "none", "options": {"a": 1}}, r"'none' has no option 'a': there are none"),
        ({"method": "fastv", "options": {"layer": 2.5}}, r"option 'layer': .*valid integer, got 2.5"),
        ({"method": "fastv", "options": {"layer": True}}, r"option 'layer': .*valid integer, got True"),
        ({"method": "fastv", "options": {"keep": None}}, r"option 'keep': .* or .*valid number, got None"),
        ({"method": "fastv", "options": {"keep": "half"}}, r"method 'fastv': keep must be .*'half'"),
        ({"method": "fastv", "options": {"keep": 1.5}}, r"method 'fastv': keep fraction must be in"),
        ({"method": "fastv", "options": {"layer": 32}}, r"method 'fastv': a stage starts at layer 32"),
        ({"method": "hidrop", "options": {"keeps": [1, 2, 3, 4]}}, r"method 'hidrop': keep must not rise"),
        ({"methd": "fastv"}, r"methd: .*; known keys: method, preset, options, positions, prefix_state_bytes, force"),
        ({"positions": "absolute"}, r"positions: .*'persistent', 'compacted', 'grouped' or 'renumbered'; known keys: "),
        ({"force": "perhaps"}, r"force: .*; known keys: .*, note$"),
        ({"layer": 3}, r"'layer' is an option of fastv, random, uniform: put it under \"options\""),
        ({"method": "fastv", "layer": 3}, r"'layer' is an option of fastv: put it under \"options\""),
        ({"method": "hidrop", "layer": 3}, r"layer: .*; known keys: .*, note$"),
        ({"metod": "fastv"}, r"metod: .*; known keys: .*, force, note; did you mean 'method'\?$"),
        ({"method": "hidrop", "preset": "tok48c1"}, r"; did you mean 'tok48-c1'\?$"),
        ({"method": "fastv", "options": {"layr": 3}}, r"; did you mean 'layer'\?$"),
        ({"method": "pyramidrop"}, r"; did you mean 'pyramiddrop'\?$"),
    ],
)
def test_a_mistake_is_refused_in_one_line_that_names_it(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        resolved(choice)
    assert "\n" not in str(error.value)


def test_an_unknown_key_of_the_checkpoint_is_refused_too() -> None:
    with pytest.raises(ValueError, match="known keys"):
        resolved({}, {"method": "hidrop", "keeps": [1]})


def test_a_schedule_for_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method 'hidrop': .* for 12 layers, the model has 32"):
        resolved({"method": "hidrop", "preset": "embedded"})


QWEN = ModelShape(28, 1296, is_dynamic=True, family="Qwen2-VL")
TRAINING_FREE = ("fastv", "pyramiddrop", "visipruner", "mustdrop")


def on(model: ModelShape, method: str, **options: Any) -> Resolved:
    return resolve(HidropConfig.parse({"method": method, "options": options}), model)


@pytest.mark.parametrize("method", TRAINING_FREE)
def test_training_free_methods_are_scaled_to_other_families_and_marked(method: str) -> None:
    for shape in (QWEN, replace(QWEN, num_layers=32), replace(QWEN, num_layers=64)):
        found = on(shape, method)
        assert found.schedule.num_layers == shape.num_layers
        assert f"method '{method}' on Qwen2-VL: {SCALED}" in str(provenance(found, shape))
    assert provenance(on(PAPER, method), PAPER) is None


def test_layers_scale_by_depth() -> None:
    assert [stage.first_layer for stage in on(QWEN, "pyramiddrop").schedule.stages] == [0, 7, 14, 21]
    scaled = on(QWEN, "visipruner").method
    assert isinstance(scaled, VisiPruner)
    assert scaled.shallow_layers == 5
    assert on(replace(QWEN, num_layers=64), "mustdrop").schedule.stages[1].first_layer == 4


def test_thresholds_of_visipruner_are_unpublished_for_all_but_one_model() -> None:
    line = provenance(on(QWEN, "visipruner"), QWEN)
    assert line is not None
    assert line.endswith("unpublished: cosine, norm, exit_cosine are LLaVA-1.5-7B's")
    thirteen = ModelShape(40, 576)
    assert provenance(on(thirteen, "visipruner"), thirteen) == (
        "method 'visipruner' on LLaVA-1.5: unpublished: cosine, norm, exit_cosine are LLaVA-1.5-7B's"
    )
    fixed = {"shallow_layers": 4, "filter_layer": 12, "exit_layer": 20, "shape": [28, 1296], "keep": "16/1296"}
    assert provenance(on(QWEN, "visipruner", **fixed), QWEN) is None


def test_layers_that_a_user_names_are_not_scaled_behind_his_back() -> None:
    with pytest.raises(ValueError, match="this visipruner schedule is for 32 layers, the model has 28"):
        on(QWEN, "visipruner", shallow_layers=4)
    named = on(QWEN, "mustdrop", filter_layers=[2, 6], shape=[28, 1296])
    assert provenance(named, QWEN) == (
        f"method 'mustdrop' on Qwen2-VL: {SCALED}: global_threshold, individual_threshold are LLaVA-1.5's"
    )


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.stock)
def test_hidrop_on_weights_that_say_nothing_of_it_warns_for_every_family(family: Family) -> None:
    """As for LLaVA-1.5: served, with a warning, where the layers fit; refused where they do not."""
    shape = ModelShape(32, 576, family.is_dynamic, family.title)
    assert "expect wrong answers" in str(training_warning(on(shape, "hidrop"), None))
    with pytest.raises(ValueError, match="this hidrop schedule is for 32 layers, the model has 28"):
        on(replace(shape, num_layers=28), "hidrop")
    trained = {"method": "hidrop", "preset": "tok48"}
    with pytest.raises(ValueError, match=r"trained for hidrop preset 'tok48', not 'tok64'; .*--force"):
        resolve(HidropConfig.parse({"method": "hidrop", "preset": "tok64"}), shape, trained)


def test_papers_write_for_the_first_family() -> None:
    assert next(iter(FAMILIES.values())).title == PUBLISHED_FAMILY
