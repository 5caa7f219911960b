"""The scenes, the recipe in small, and the checkpoint that ships."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vllm_hidrop.embedded import CHECKPOINTS
from vllm_hidrop.lab.train import embedded
from vllm_hidrop.lab.train.batches import IGNORED, exact_matches, pack_questions
from vllm_hidrop.lab.train.evaluate import COUNT, Checkpoint, Probe, evaluate, make_example, probes_of
from vllm_hidrop.lab.train.initial import initialise_language_model
from vllm_hidrop.lab.train.model import build_model
from vllm_hidrop.lab.train.prefix_llm import LateRead
from vllm_hidrop.lab.train.questions import QUESTION_TYPES, Question, ask, draw_questions
from vllm_hidrop.lab.train.rows import Rows, packed_starts
from vllm_hidrop.lab.train.scenes import (
    COLOURS,
    GAP,
    IMAGE_SIDE,
    NUM_PATCHES,
    PATCH_SIDE,
    PATCHES_PER_SIDE,
    UNSEEN_PAIRS,
    Scene,
    Thing,
    held_out_seed,
    make_crowded_scene,
    make_scene,
    patch_owners,
    render,
)
from vllm_hidrop.lab.train.schedules import DENSE, HIDROP, with_schedule
from vllm_hidrop.lab.train.stages import Vision, answer_logits
from vllm_hidrop.lab.train.vocabulary import TOKEN_IDS, VOCABULARY, build_tokenizer
from vllm_hidrop.plan.schedule import Schedule

EXAMPLES = Path(__file__).parents[3] / "examples"
NUM_HELD_OUT_SCENES = 25
MakeScene = Callable[[int], Scene]
Figures = dict[str, Any]

HAND_MADE = Scene(
    7,
    (
        Thing("star", "red", 8, 8, 20, 20),
        Thing("heart", "blue", 160, 80, 28, 28),
        Thing("ring", "red", 80, 160, 20, 20),
        Thing("word", "white", 60, 40, 68, 16, "hotel"),
    ),
)


def all_questions(scene: Scene, question_type: str) -> dict[str, str]:
    """What 200 draws ask of a scene, with the answers."""
    rng = np.random.default_rng(0)
    drawn = [ask(scene, question_type, rng) for _ in range(200)]
    return {one.text: one.answer for one in drawn if one is not None}


# --- Scenes --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_scene, make_crowded_scene])
def test_a_seed_gives_the_same_scene_and_pixels_every_time(make: MakeScene) -> None:
    assert make(11) == make(11)
    assert np.array_equal(render(make(11)), render(make(11)))
    assert make(11) != make(12)


@pytest.mark.parametrize("make", [make_scene, make_crowded_scene])
def test_things_lie_inside_the_image_and_apart_from_each_other(make: MakeScene) -> None:
    for seed in range(40):
        boxes = np.zeros((IMAGE_SIDE, IMAGE_SIDE), int)
        for thing in make(seed).things:
            top, left = max(0, thing.top - GAP + 1), max(0, thing.left - GAP + 1)
            assert boxes[top : thing.top + thing.height + GAP, left : thing.left + thing.width + GAP].sum() == 0
            boxes[thing.top : thing.top + thing.height, thing.left : thing.left + thing.width] = 1
            assert thing.left + thing.width <= IMAGE_SIDE
            assert thing.top + thing.height <= IMAGE_SIDE


def test_scenes_hold_three_to_seven_different_objects_and_often_a_word() -> None:
    scenes = [make_scene(seed) for seed in range(300)]
    assert {len(scene.objects) for scene in scenes} == {3, 4, 5, 6, 7}
    assert all(len({thing.kind for thing in scene.objects}) == len(scene.objects) for scene in scenes)
    assert 0.6 < np.mean([scene.word is not None for scene in scenes]) < 0.8


def test_held_out_seeds_are_no_training_seeds() -> None:
    assert held_out_seed(0) > embedded.FIRST_FEATURE_SEED + embedded.FULL_RECIPE.num_feature_scenes


def test_a_things_patches_are_where_it_is_drawn() -> None:
    owners, is_clear = patch_owners(HAND_MADE)
    assert owners.shape == is_clear.shape == (NUM_PATCHES,)
    grid = owners.reshape(PATCHES_PER_SIDE, PATCHES_PER_SIDE)
    rows, columns = np.nonzero(grid == 1)
    assert (rows.min(), rows.max() + 1) == (80 // PATCH_SIDE, -(-108 // PATCH_SIDE))
    assert (columns.min(), columns.max() + 1) == (160 // PATCH_SIDE, -(-188 // PATCH_SIDE))


def test_an_object_is_painted_in_its_colour() -> None:
    centre = render(HAND_MADE)[94, 174].astype(int)
    assert np.abs(centre - COLOURS["blue"]).max() < 40


# --- Questions -----------------------------------------------------------------------------


def test_colours_are_asked_of_every_object() -> None:
    assert all_questions(HAND_MADE, "colour") == {
        "what colour is the star ?": "red",
        "what colour is the heart ?": "blue",
        "what colour is the ring ?": "red",
    }


def test_an_object_is_asked_for_only_by_a_colour_no_other_has() -> None:
    assert all_questions(HAND_MADE, "object") == {"which object is blue ?": "heart"}


def test_counting_counts_objects_but_not_the_word() -> None:
    answers = all_questions(HAND_MADE, "count")
    assert answers["how many objects are there ?"] == "3"
    assert answers["how many red objects are there ?"] == "2"
    assert answers["how many white objects are there ?"] == "0"


def test_places_are_cells_of_a_grid_of_three_by_three() -> None:
    assert all_questions(HAND_MADE, "where") == {
        "where is the star ?": "top left",
        "where is the heart ?": "middle right",
        "where is the ring ?": "bottom center",
    }


def test_existence_is_asked_of_shown_and_of_absent_objects() -> None:
    answers = all_questions(HAND_MADE, "exist")
    assert answers["is there a star ?"] == "yes"
    assert answers["is there a moon ?"] == "no"
    assert sum(answer == "yes" for answer in answers.values()) == 3


def test_relations_compare_centres() -> None:
    answers = all_questions(HAND_MADE, "relation")
    assert answers["is the star left of the heart ?"] == "yes"
    assert answers["is the heart left of the star ?"] == "no"
    assert answers["is the star above the ring ?"] == "yes"
    assert answers["is the ring above the heart ?"] == "no"


def test_a_word_is_read_where_there_is_one() -> None:
    assert all_questions(HAND_MADE, "read") == {"what does the text say ?": "hotel"}
    assert all_questions(replace(HAND_MADE, things=HAND_MADE.things[:3]), "read") == {}


def test_every_word_that_is_asked_or_answered_is_known() -> None:
    rng = np.random.default_rng(0)
    for seed in range(50):
        for question in draw_questions(make_scene(seed), rng, 10, tuple(QUESTION_TYPES)):
            assert set(question.text.split()) | set(question.answer.split()) <= set(VOCABULARY)


# --- Tokenizer and batches -----------------------------------------------------------------


def test_users_may_type_capitals_other_spellings_and_unknown_words() -> None:
    tokenizer = build_tokenizer()
    plain = tokenizer("what colour is the star ?").input_ids
    assert tokenizer("What color is the STAR?").input_ids == plain
    assert tokenizer("Is there an arrow?").input_ids == tokenizer("is there a arrow ?").input_ids
    assert tokenizer("what zeppelin").input_ids == [TOKEN_IDS["what"], TOKEN_IDS["<unk>"]]


def test_an_answer_decodes_without_a_leading_space_after_its_prompt() -> None:
    tokenizer = build_tokenizer()
    prompt = tokenizer("<bos><user><image>where is the star ?<assistant>").input_ids
    whole = tokenizer.decode([*prompt, *tokenizer("top left<eos>").input_ids], skip_special_tokens=True)
    assert whole == "<user>where is the star?<assistant>top left"


def test_targets_of_a_block_are_its_answer_and_end() -> None:
    rng = np.random.default_rng(1)
    batch = pack_questions([[Question("where", "where is the star ?", "top left")]], rng, 0.0)
    targets = batch.targets[batch.targets >= 0].tolist()
    assert [VOCABULARY[token] for token in targets] == ["top", "left", "<eos>"]
    assert exact_matches(batch, batch.targets) == {"where": [True]}
    assert exact_matches(batch, torch.zeros_like(batch.targets)) == {"where": [False]}


def test_the_shared_prefix_pass_computes_what_the_plain_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_hidrop.lab.train.stages.SYSTEM_FRACTION", 0.0)
    model, rng = build_model(0), np.random.default_rng(0)
    vision = Vision(torch.randn(2, NUM_PATCHES, 128), torch.arange(NUM_PATCHES).expand(2, -1))
    scenes = [make_scene(1), make_scene(2)]
    text = pack_questions([draw_questions(scene, rng, 3, ("colour", "where")) for scene in scenes], rng)
    embed = model.get_input_embeddings()
    head = embed(torch.tensor([TOKEN_IDS["<bos>"], TOKEN_IDS["<user>"]]))
    with torch.no_grad():
        dense = with_schedule(model, DENSE)
        shared = answer_logits(dense, model, vision, text, rng)
        in_block = text.blocks[1] == 1
        rows = torch.cat([head, vision.embeddings[1], embed(text.ids[1][in_block])])
        plain = model.model.language_model(inputs_embeds=rows[None]).last_hidden_state
        expected = model.lm_head(plain)[0, len(head) + NUM_PATCHES :]
        late = answer_logits(dense, model, vision, text, rng, LateRead(6, 1))
    assert (shared[1][in_block] - expected).abs().max() < 0.1 * expected.abs().max()
    assert not torch.allclose(late[1][in_block], shared[1][in_block], atol=1e-3)


def test_the_shared_image_pass_prunes_as_the_staged_forward_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_hidrop.lab.train.stages.SYSTEM_FRACTION", 0.0)
    model, rng = build_model(0), np.random.default_rng(0)
    initialise_language_model(model, 3)
    vision = Vision(torch.randn(2, NUM_PATCHES, 128) * 0.1, torch.arange(NUM_PATCHES).expand(2, -1))
    scenes = [make_scene(1), make_scene(2)]
    text = pack_questions([draw_questions(scene, rng, 3, ("colour", "where")) for scene in scenes], rng, 0.0)
    staged = with_schedule(model, HIDROP)
    embed = model.get_input_embeddings()
    head = embed(torch.tensor([TOKEN_IDS["<bos>"], TOKEN_IDS["<user>"]]))
    in_block = text.blocks[1] == 2
    with torch.no_grad():
        shared = answer_logits(staged, model, vision, text, rng)[1][in_block]
        alone = torch.cat([head, vision.embeddings[1], embed(text.ids[1][in_block])])
        is_asked = text.targets[1][in_block] != IGNORED
        images = torch.full(alone.shape[:1], -1)
        images[2 : 2 + NUM_PATCHES] = 0
        is_query = torch.zeros(len(alone), dtype=torch.bool)
        is_query[2 + NUM_PATCHES + int(is_asked.nonzero()[0])] = True
        rows = Rows(torch.arange(len(alone)), images, is_query, packed_starts([len(alone)]))
        output = staged(alone, rows)
    expected = model.lm_head(output.hidden)[2:]
    assert (shared - expected).abs().max() < 0.1 * expected.abs().max()  # one in bfloat16, one in float32


def test_colours_of_some_kinds_are_seen_in_held_out_scenes_only() -> None:
    def pairs(seeds: range, make: MakeScene) -> set[tuple[str, str]]:
        return {(thing.kind, thing.colour) for seed in seeds for thing in make(seed).objects}

    trained = pairs(range(300), make_crowded_scene) | pairs(range(1500), make_scene)
    assert not trained & UNSEEN_PAIRS
    held_out = pairs(range(held_out_seed(0), held_out_seed(1500)), make_scene)
    assert held_out == trained | UNSEEN_PAIRS


# --- Training in small ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "hidrop"])
def test_smoke_training_leaves_a_checkpoint_that_loads(smoke_directory: Path, form: str) -> None:
    model, report = LlavaForConditionalGeneration.from_pretrained(
        smoke_directory / form, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.text_config.max_position_embeddings >= 16384
    expected = {"method": "hidrop", "preset": "embedded"} if form == "hidrop" else None
    assert getattr(model.config, "hidrop", None) == expected
    assert AutoProcessor.from_pretrained(smoke_directory / form).patch_size == PATCH_SIDE


def test_training_resumes_from_the_stages_it_finds(smoke_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "train_tower", None)
    training = embedded.Training(embedded.SMOKE_RECIPE, smoke_directory, "hidrop")
    embedded.run_stages(training)
    finished = torch.load(smoke_directory / "stage_hidrop_images.pt", weights_only=True)["model"]
    assert all(torch.equal(finished[name], tensor) for name, tensor in training.model.state_dict().items())


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    training = embedded.Training(embedded.SMOKE_RECIPE, tmp_path, "dense")
    with pytest.raises(ValueError, match=r"unknown stages \['towel'\]; known: tower, symbols_12"):
        embedded.run_stages(training, ["towel"])


# --- The checkpoint that ships ---------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(CHECKPOINTS["dense"])


@pytest.fixture(scope="module")
def pruned() -> Checkpoint:
    return Checkpoint(CHECKPOINTS["hidrop"])


@pytest.fixture(scope="module")
def figures(pruned: Checkpoint) -> Figures:
    return evaluate(pruned, NUM_HELD_OUT_SCENES, probes_of(pruned.schedule))


def test_both_checkpoints_answer_held_out_questions(checkpoint: Checkpoint, figures: Figures) -> None:
    examples = [make_example(index) for index in range(NUM_HELD_OUT_SCENES)]
    dense = [right for one in examples for right in checkpoint.is_right(one.image, one.questions)]
    assert sum(dense) / len(dense) >= 0.92
    assert figures["own"]["all"] >= 0.82
    assert figures["mean_vision_tokens"] == 64


def test_the_pruned_checkpoint_fails_on_another_scenes_image(figures: Figures) -> None:
    assert figures["wrong_image"]["all"] < 0.5


@pytest.mark.parametrize("layer", [3, 4])
def test_keeping_the_worst_tokens_is_clearly_worse_at_every_cut(figures: Figures, layer: int) -> None:
    (worst,) = (probe for probe in figures["probes"] if probe["layer"] == layer and probe["selector"] == "worst")
    assert worst["all"] < figures["own"]["all"] - 0.1
    assert worst["same"] < figures["own"]["same"] - 0.2


def test_generate_stops_at_the_end_of_an_answer_of_one_or_two_words(checkpoint: Checkpoint) -> None:
    example = make_example(0)
    asked = [question for question in example.questions if question.type != COUNT]
    answers = [checkpoint.generate(example.image, question.text) for question in asked]
    expected = checkpoint.is_right(example.image, asked)
    assert [answer == one.answer for answer, one in zip(answers, asked, strict=True)] == expected


def test_the_sample_images_are_answered_as_their_file_says(checkpoint: Checkpoint) -> None:
    lines = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 10
    for line in lines:
        with Image.open(EXAMPLES / line["image"]) as image:
            assert checkpoint.generate(np.asarray(image), line["question"]) == line["answer"]


def test_a_cut_that_keeps_every_token_changes_nothing(checkpoint: Checkpoint) -> None:
    example = make_example(1)
    whole = Probe("all", Schedule.of({0: "all", 3: NUM_PATCHES}, checkpoint.schedule.num_layers), 3)
    expected = checkpoint.is_right(example.image, example.questions)
    assert checkpoint.is_right(example.image, example.questions, whole) == expected


def test_the_chat_template_puts_images_first_and_tolerates_all_roles(checkpoint: Checkpoint) -> None:
    text, image = {"type": "text", "text": "What colour is the star?"}, {"type": "image"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text, image]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Where is it?"},
    ]
    rendered = checkpoint.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == (
        "<bos><system>Be brief.<user><image>What colour is the star?<assistant>red<eos><user>Where is it?<assistant>"
    )


@pytest.mark.parametrize("form", CHECKPOINTS)
def test_the_checkpoint_is_small_and_in_the_hubs_naming(form: str) -> None:
    weights = CHECKPOINTS[form] / "model.safetensors"
    assert weights.stat().st_size < 12e6
    with safe_open(weights, framework="pt") as stored:
        names = set(stored.keys())
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert "language_model.lm_head.weight" in names
