"""The paper's rejected position schemes on the real engine, against the dense masked reference with the same scheme."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig
from typer.testing import CliRunner

from tests.engine.harness import engine, in_any_order
from tests.engine.test_oracle_parity import OWN, asks, check_equal, reference, selections_of
from tests.engine.test_start import configure
from tests.lab.train.llava_data import make_talking_llava, write_data
from vllm_hidrop.cli.app import app
from vllm_hidrop.engine.model_checks import check_rope
from vllm_hidrop.plan.positions import PositionScheme
from vllm_hidrop.verify.tiny_models import make_llava

pytestmark = pytest.mark.engine

PYRAMID = OWN | {"inject_layer": 3, "filter_layers": [4, 6], "keeps": [20, 5], "exit_layer": None}
CHOICES: dict[str, dict[str, Any]] = {
    # A cut under the next layer's attention, twice; late injection; early exit.
    "hidrop": {"method": "hidrop", "options": PYRAMID},
    "hidrop with exit": {"method": "hidrop", "options": PYRAMID | {"filter_layers": [4, 5], "exit_layer": 8}},
    # Cuts under the attention of the layer before, and under none.
    "fastv": {"method": "fastv", "options": {"layer": 3, "keep": 7}},
    "random": {"method": "random", "options": {"layer": 0, "keep": 9}},
}
CASES = [(scheme, name, CHOICES[name]) for scheme in ("compacted", "grouped") for name in CHOICES]
CASES.append(("grouped", "none", {"method": "none"}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), "mistral")


@pytest.mark.parametrize(("scheme", "choice"), [pytest.param(s, c, id=f"{s}-{name}") for s, name, c in CASES])
def test_the_engine_equals_the_oracle_under_every_scheme(model: Path, scheme: str, choice: dict[str, Any]) -> None:
    """Pruned requests, ``off`` ones (one in two chunks) and text in one batch, up to three images, six tokens each."""
    choice = choice | {"positions": scheme}
    together = asks() + asks(hidrop="off")
    expected = [reference(model, choice, ask) for ask in together]
    with engine(model, choice, max_num_batched_tokens=1024) as running:
        if choice["method"] == "none":
            answers = running.ask(together)
        else:
            with running.record_selections() as kept:
                answers = running.ask(together)
            assert in_any_order(kept) == in_any_order(selections_of(expected))
    for answer, result in zip(answers, expected, strict=True):
        check_equal(answer, result)
    # Were the scheme ignored, the engine would not have passed: with an image the logits are others.
    persistent = [reference(model, choice | {"positions": "persistent"}, ask) for ask in together]
    for ask, result, other in zip(together, expected, persistent, strict=True):
        is_same = torch.allclose(result.logits[0], other.logits[0], atol=1e-2)
        is_cut = choice["method"] != "none" and ask.options.get("hidrop") != "off"
        assert is_same == (not ask.images or (scheme == "compacted" and not is_cut))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``hidrop train`` leaves of one step with grouped positions."""
    directory = tmp_path_factory.mktemp("trained")
    settings = {
        "model": str(make_talking_llava(directory / "start")),
        "output": str(directory / "out"),
        "data": {"format": "llava-json", "path": str(write_data(directory / "data"))},
        "stage": "instruct",
        "steps": 1,
        "hidrop": CHOICES["hidrop"],
        "positions": "grouped",
    }
    (directory / "train.yaml").write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["train", str(directory / "train.yaml")])
    assert result.exit_code == 0, result.output
    return directory / "out" / "model"


def test_a_model_trained_with_grouped_positions_is_served_with_them(trained: Path) -> None:
    assert json.loads((trained / "config.json").read_text())["hidrop"]["positions"] == "grouped"
    choice = CHOICES["hidrop"] | {"positions": "grouped"}
    expected = [reference(trained, choice, ask) for ask in asks()]
    with engine(trained, {}) as running:
        for answer, result in zip(running.ask(asks()), expected, strict=True):
            check_equal(answer, result)


@pytest.mark.parametrize("positions", ["persistent", "compacted"])
def test_other_positions_than_the_trained_are_refused_unless_forced(trained: Path, positions: str) -> None:
    with pytest.raises(ValueError, match=f'trained with grouped positions, not {positions}; .*"force": true'):
        configure(trained, {"positions": positions})
    config = configure(trained, {"positions": positions, "force": True})
    assert config.additional_config["hidrop"]["resolved"]["positions"] == positions


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling"),
        ({"dual_chunk_attention_config": {"chunk_size": 512}}, "dual_chunk_attention_config"),
    ],
)
def test_ids_of_our_own_are_refused_for_a_rotation_that_reads_more_than_an_id(
    model: Path, change: dict[str, Any], found: str
) -> None:
    text_config = AutoConfig.from_pretrained(model).text_config
    check_rope(text_config, PositionScheme.COMPACTED)
    for name, value in change.items():
        setattr(text_config, name, value)
    with pytest.raises(ValueError, match=f"compacted positions need plain RoPE .* has {found}"):
        check_rope(text_config, PositionScheme.COMPACTED)


def test_such_a_model_is_refused_at_the_start_but_not_with_persistent_positions(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["text_config"]["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"grouped positions need plain RoPE .* has rope type 'dynamic'"):
        configure(tmp_path / "model", CHOICES["fastv"] | {"positions": "grouped"})
    assert configure(tmp_path / "model", CHOICES["fastv"])
