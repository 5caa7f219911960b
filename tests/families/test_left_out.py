"""MustDrop's part in the vision tower: left out with a warning where no reduction can run, refused where asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_start import configure
from vllm_hidrop.engine.configure import methods_of
from vllm_hidrop.engine.model_checks import reduction_of
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

REASONS = {
    "qwen2_5_vl": "no reduction is written for the vision tower of Qwen2.5-VL",
    "llava-siglip": "it needs a vision tower whose class token ranks the patches, as CLIP's does",
}


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    siglip = make_llava(tmp_path_factory.mktemp("llava"), tower="siglip")
    return lambda name: siglip if name == "llava-siglip" else checkpoint(name)


def configured(model: Callable[[str], Path], name: str, **options: Any) -> Any:
    """vLLM's configuration of a server of that model with MustDrop and these options."""
    architecture = {
        "qwen2_5_vl": "HidropQwen2_5_VLForConditionalGeneration",
        "llava-siglip": "HidropLlavaForConditionalGeneration",
    }[name]
    return configure(model(name), mustdrop(**options), hf_overrides={"architectures": [architecture]})


def mustdrop(**options: Any) -> dict[str, Any]:
    return {"method": "mustdrop", "options": {"scale": True, **options}}


@pytest.mark.parametrize("name", REASONS)
def test_the_presets_part_in_the_tower_is_left_out_and_told(
    model: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        "vllm_hidrop.engine.configure.logger.warning_once", lambda text, *args: told.append(text % args)
    )
    found = configured(model, name)
    assert reduction_of(methods_of(found).values()) is None
    resolved = found.additional_config["hidrop"]["resolved"]
    assert resolved["options"] == {"scale": True, "merge_threshold": None, "key_rate": 0.0}
    left_out = f"runs without its part in the vision tower (merge_threshold, key_rate): {REASONS[name]}."
    assert set(told) == {f"method 'mustdrop' {left_out}"}
    told.clear()
    configured(model, name, merge_threshold=None, key_rate=0.0)
    assert told == []


@pytest.mark.parametrize("name", REASONS)
@pytest.mark.parametrize("options", [{"key_rate": 0.2}, {"merge_threshold": 0.5, "key_rate": 0.0}])
def test_options_that_ask_for_it_are_refused(
    model: Callable[[str], Path], name: str, options: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match=f"method 'mustdrop': {REASONS[name]}; leave out {next(iter(options))}"):
        configured(model, name, **options)
