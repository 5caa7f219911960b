"""The rows of the ablation table: their schedules, their entries in config.json, and their training in small."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.embedded import CHECKPOINTS
from vllm_hidrop.lab.train import embedded
from vllm_hidrop.lab.train.batches import IGNORED, pack_questions
from vllm_hidrop.lab.train.evaluate import Checkpoint, make_example
from vllm_hidrop.lab.train.initial import initialise_language_model
from vllm_hidrop.lab.train.model import build_model
from vllm_hidrop.lab.train.questions import draw_questions
from vllm_hidrop.lab.train.rows import Rows, packed_starts
from vllm_hidrop.lab.train.scenes import NUM_PATCHES, make_scene
from vllm_hidrop.lab.train.schedules import FLAT_KEEP, FORMS, HIDROP, SHAPE, Form, trained_entry, with_schedule
from vllm_hidrop.lab.train.staged import Selection, StagedTraining
from vllm_hidrop.lab.train.stages import Vision, answer_logits
from vllm_hidrop.lab.train.vocabulary import TOKEN_IDS
from vllm_hidrop.methods.fastv import FastV
from vllm_hidrop.plan.positions import PositionScheme

SAME_BUDGET = ("flat", "pyramiddrop", "early_cut", "random", "compacted", "grouped", "hidrop_seed1")


def mean_tokens(form: str) -> float:
    return FORMS[form].method.schedule(SHAPE).mean_kept(SHAPE.tokens_per_image)


@pytest.mark.parametrize("form", FORMS)
def test_a_forms_entry_resolves_to_the_schedule_it_trains_with(form: str) -> None:
    entry = json.loads(json.dumps(trained_entry(form)))
    resolved = resolve(HidropConfig.parse({}), SHAPE, entry)
    assert resolved.schedule == FORMS[form].method.schedule(SHAPE)
    assert resolved.method == FORMS[form].method
    assert resolved.positions == FORMS[form].position_scheme


@pytest.mark.parametrize("form", SAME_BUDGET)
def test_rows_of_one_budget_keep_as_many_tokens_as_hidrop(form: str) -> None:
    assert mean_tokens(form) == pytest.approx(mean_tokens("hidrop"), abs=1)


def test_without_a_part_of_the_schedule_more_tokens_are_kept() -> None:
    for form in ("no_injection", "no_exit", "no_pyramid"):
        assert mean_tokens(form) > mean_tokens("hidrop") + 1


def test_every_other_selection_has_a_row() -> None:
    trained = {form.selection for form in FORMS.values() if form.method == HIDROP}
    assert trained == set(Selection)


def test_a_method_that_needs_the_layer_before_cannot_be_a_form() -> None:
    with pytest.raises(ValueError, match="fastv: embedded training scores under the layer about to run"):
        Form(FastV(layer=1, keep=17), "FastV")


@pytest.mark.parametrize("scheme", PositionScheme)
def test_the_shared_image_pass_numbers_rows_as_the_staged_forward_does(
    monkeypatch: pytest.MonkeyPatch, scheme: PositionScheme
) -> None:
    monkeypatch.setattr("vllm_hidrop.lab.train.stages.SYSTEM_FRACTION", 0.0)
    model, rng = build_model(0), np.random.default_rng(0)
    initialise_language_model(model, 3)
    vision = Vision(torch.randn(1, NUM_PATCHES, 128) * 0.1, torch.arange(NUM_PATCHES)[None])
    text = pack_questions([draw_questions(make_scene(1), rng, 1, ("where",))], rng, 0.0)
    staged = with_schedule(model, HIDROP, position_scheme=scheme)
    head = model.get_input_embeddings()(torch.tensor([TOKEN_IDS["<bos>"], TOKEN_IDS["<user>"]]))
    with torch.no_grad():
        shared = answer_logits(staged, model, vision, text, rng)[0]
        alone = torch.cat([head, vision.embeddings[0], model.get_input_embeddings()(text.ids[0])])
        images = torch.full(alone.shape[:1], -1)
        images[2 : 2 + NUM_PATCHES] = 0
        is_query = torch.zeros(len(alone), dtype=torch.bool)
        is_query[2 + NUM_PATCHES + int((text.targets[0] != IGNORED).nonzero()[0])] = True
        rows = Rows(torch.arange(len(alone)), images, is_query, packed_starts([len(alone)]))
        expected = model.lm_head(staged(alone, rows).hidden)[2:]
    assert (shared - expected).abs().max() < 0.1 * expected.abs().max()  # one in bfloat16, one in float32


def test_a_row_is_trained_and_served_with_its_own_schedule(smoke_directory: Path) -> None:
    config = json.loads((smoke_directory / "flat" / "config.json").read_text(encoding="utf-8"))
    assert config["hidrop"] == trained_entry("flat")
    assert Checkpoint(smoke_directory / "flat").schedule.kept(NUM_PATCHES) == (0, 576, FLAT_KEEP, 0)


def test_a_rows_seed_changes_its_own_stages_and_not_the_base(smoke_directory: Path) -> None:
    first, second = (
        torch.load(smoke_directory / f"stage_{name}_images.pt", weights_only=True)["model"]
        for name in ("hidrop", "hidrop_seed1")
    )
    differs = {name for name in first if not torch.equal(first[name], second[name])}
    assert any("language_model" in name for name in differs)
    assert not any("vision_tower" in name for name in differs)


def test_rows_that_are_there_are_not_trained_again(
    smoke_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedded, "FORMS", {name: FORMS[name] for name in ("hidrop", "flat")})
    monkeypatch.setattr(embedded, "run_stages", None)
    embedded.main(["all-ablations", "--smoke", "--out", str(smoke_directory)])
    assert capsys.readouterr().out == "1 of 2, hidrop: is there\n2 of 2, flat: is there\n"


def test_the_small_recipe_shares_the_base_and_nothing_else(tmp_path: Path) -> None:
    full = embedded.Training(embedded.FULL_RECIPE, tmp_path, "hidrop")
    small = embedded.Training(embedded.SMALL_RECIPE, tmp_path, "hidrop")
    assert list(full.stages())[:-2] == list(small.stages())[:-2]
    assert list(small.stages())[-1] == "small_hidrop_images"
    assert small.checkpoint == tmp_path / "small" / "hidrop" != full.checkpoint


def test_the_staged_answer_is_what_teacher_forcing_calls_right() -> None:
    checkpoint, example = Checkpoint(CHECKPOINTS["hidrop"]), make_example(0)
    answers = [checkpoint.answer(example.image, question.text) for question in example.questions]
    right = checkpoint.is_right(example.image, example.questions)
    assert [answer == one.answer for answer, one in zip(answers, example.questions, strict=True)] == right


@pytest.mark.parametrize("scheme", list(PositionScheme))
def test_a_checkpoint_is_evaluated_with_its_own_positions(scheme: PositionScheme, tmp_path: Path) -> None:
    """Other ids than the trained ones cost answers, so an evaluation that ignored the entry would be wrong unseen."""
    for file in CHECKPOINTS["hidrop"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["hidrop"]["positions"] = str(scheme)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    seen: list[PositionScheme] = []
    checkpoint, make = Checkpoint(tmp_path), Checkpoint.staged

    def staged(self: Checkpoint, *arguments: Any) -> StagedTraining:
        made = make(self, *arguments)
        seen.append(made.position_scheme)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "staged", staged)
        example = make_example(0)
        checkpoint.is_right(example.image, example.questions[:1])
        checkpoint.answer(example.image, example.questions[0].text, 1)
    assert seen == [scheme, scheme]
